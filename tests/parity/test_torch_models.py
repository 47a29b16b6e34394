"""Our plain PyTorch modules against the original's recorded outputs and gradients."""

from __future__ import annotations

import pytest

from iv2_jax import config as config_lib
from tests.parity import goldens

pytestmark = pytest.mark.torch

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


@pytest.mark.parametrize("fused_attention", [False, True], ids=["plain", "sdpa"])
def test_student(case, fused_attention):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import video as torch_models

    config = goldens.student_config(case)
    contents = {"kind": "student", "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents, fused_attention=fused_attention)
    # Strict, with the original's own names: nothing missing, nothing left over.
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in case.weights.items()})
    inputs = {k: torch.from_numpy(v.copy()) for k, v in case.inputs.items()}
    out = model(inputs["video"], inputs["mask"])
    encoded = model.encode(inputs["video"], inputs["mask"])

    pairs = {"clip_middle": out.clip, "pooled": encoded.pooled, "block_last": encoded.tokens}
    if config.final_width:
        pairs["clip_final"] = out.final
    if config.mae:
        pairs["mae"] = out.mae
    compared = {name: value for name, value in pairs.items() if name in case.outputs}
    assert {"clip_middle", "pooled"} <= compared.keys()
    for name, value in compared.items():
        goldens.assert_close(value.detach(), case.outputs[name], goldens.OUTPUT_LIMIT, name)

    _loss(out, inputs, case).backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert case.grads
    for key, reference in case.grads.items():
        goldens.assert_close(gradients[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")


def _loss(out, inputs, case):
    """The three terms of spec stage1 3.3."""
    mask, ratios = inputs["mask"], case.meta.get("loss_ratios", {})

    def mean_distance(ours, target, hidden=None):
        if hidden is not None:
            target = target[:, ~hidden].reshape(ours.shape)
        return (2 - 2 * (ours * target).sum(-1)).mean()

    loss = ratios.get("clip_middle", 1.0) * mean_distance(
        out.clip, inputs["teacher_clip_middle"], mask
    )
    if out.final is not None:
        loss = loss + ratios.get("clip_final", 1.0) * mean_distance(
            out.final, inputs["teacher_clip_final"]
        )
    if out.mae is not None:
        loss = loss + ratios.get("mae", 1.0) * mean_distance(
            out.mae, inputs["teacher_mae"], mask[:, 1:]
        )
    return loss
