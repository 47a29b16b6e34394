"""The students against the original: outputs, intermediates, losses and gradients."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from iv2_jax.interop import torch_keys
from iv2_jax.models.masking import mask_to_visible
from iv2_jax.models.student import Student
from iv2_jax.models.video_encoder import VideoEncoder
from iv2_jax.objectives.distillation import alignment_loss, final_loss, gather_targets
from tests.parity import goldens

CASES = [
    "s1_pretrain_joint",
    "s1_pretrain_sep_tubelet2_nofinal",
    "s1_pretrain_fused_tanh_gelu",
    "s1_distill_linear",
    "s1_distill_mlp_index",
]


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    return golden(request.param)


def _loss_terms(config, params, inputs, visible):
    """Student output and the three terms of the loss, unweighted."""
    out = Student(config).apply({"params": params}, inputs["video"], visible)
    clip = gather_targets(inputs["teacher_clip_middle"], visible, has_cls=True)
    terms = {"clip_middle": alignment_loss(out.clip, clip)}
    if config.final_width:
        terms["clip_final"] = final_loss(out.final, inputs["teacher_clip_final"])
    if config.mae:
        mae = gather_targets(inputs["teacher_mae"], visible, has_cls=False)
        terms["mae"] = alignment_loss(out.mae, mae)
    return out, terms


def test_outputs_losses_and_gradients(case):
    config = goldens.student_config(case)
    ratios = case.meta.get("loss_ratios", {})

    def loss_fn(params, inputs, visible):
        out, terms = _loss_terms(config, params, inputs, visible)
        total = sum(ratios.get(name, 1.0) * term for name, term in terms.items())
        return total, (out, terms)

    inputs = case.inputs | {"video": case.video}
    (loss, (out, terms)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        goldens.student_params(case, config), inputs, mask_to_visible(inputs["mask"])
    )

    goldens.assert_close(out.clip, case.outputs["clip_middle"], goldens.OUTPUT_LIMIT, "clip")
    assert out.clip_weight is None
    assert out.mae_weight is None
    if config.final_width:
        goldens.assert_close(out.final, case.outputs["clip_final"], goldens.OUTPUT_LIMIT, "final")
    if config.mae:
        goldens.assert_close(out.mae, case.outputs["mae"], goldens.OUTPUT_LIMIT, "mae")
    for name, term in terms.items():
        assert abs(term - case.outputs[f"loss_{name}"]) < goldens.LOSS_LIMIT, name
    assert abs(loss - case.loss) < goldens.LOSS_LIMIT

    torch_grads = torch_keys.to_torch(grads, torch_keys.student_map(config))
    assert case.grads
    for key, reference in case.grads.items():
        goldens.assert_close(torch_grads[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")


def test_named_intermediates(case):
    config = goldens.student_config(case).encoder
    params = {"params": goldens.student_params(case, goldens.student_config(case))["encoder"]}
    encoder = VideoEncoder(config)

    @jax.jit
    def run(params, video, visible):
        patches = encoder.apply(params, video, method="embed_patches")
        first = encoder.apply(params, video, visible, method="embed")
        return patches, first, encoder.apply(params, video, visible, return_layers=(0, -1))

    patches, first, out = run(params, case.video, mask_to_visible(case.inputs["mask"]))
    ours = {
        "patch_embed": patches.reshape(case.outputs["patch_embed"].shape),
        "block0_in": first,
        "block0": out.features[0],
        "block_last": out.features[1],
        "pooled": out.pooled,
    }
    np.testing.assert_array_equal(out.tokens, out.features[1])
    named = ours.keys() & case.outputs.keys()
    assert {"patch_embed", "block0_in", "pooled"} <= named
    for name in named:
        goldens.assert_close(ours[name], case.outputs[name], goldens.OUTPUT_LIMIT, name)


def test_target_gather(case):
    visible = mask_to_visible(case.inputs["mask"])
    for name, has_cls in (("clip_middle", True), ("mae", False)):
        if f"targets_{name}_visible" in case.outputs:
            gathered = gather_targets(case.inputs[f"teacher_{name}"], visible, has_cls=has_cls)
            np.testing.assert_array_equal(gathered, case.outputs[f"targets_{name}_visible"])
