"""The classifiers against the original: outputs, intermediates, losses and gradients."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from iv2_jax import config as config_lib
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.classifier import classifier_map
from iv2_jax.models.classifier import Classifier
from iv2_jax.models.video_encoder import VideoEncoder
from tests.parity import goldens
from tests.parity.conftest import goldens_folder

CASES = ["s1_finetune", "s1_finetune_sep_tubelet2", "s1_finetune_ap"]


def pytest_generate_tests(metafunc):
    """Every set has the cases above and some with merged tokens, other ones in each."""
    if "case" in metafunc.fixturenames:
        merged = goldens_folder(metafunc.config).glob("s1_finetune_cat_*.safetensors")
        names = [*CASES, *sorted(path.stem for path in merged)]
        metafunc.parametrize("case", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request, golden):
    return golden(request.param)


def test_a_set_has_merged_heads(request):
    names = {path.stem for path in goldens_folder(request.config).glob("s1_finetune*")}
    if not {*CASES} <= names:
        pytest.skip("the shipped subset does not hold every classifier; pass --goldens DIR")
    assert any("_cat_" in name for name in names)


def test_outputs_losses_and_gradients(case):
    config = goldens.classifier_config(case)
    entries = classifier_map(config)
    params = goldens.classifier_params(case, config)

    def loss_fn(params):
        logits, state = Classifier(config).apply(
            {"params": params}, case.video, capture_intermediates=True, mutable=["intermediates"]
        )
        loss = optax.softmax_cross_entropy(logits, case.inputs["soft_target"]).mean()
        return loss, (logits, state["intermediates"])

    (loss, (logits, seen)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    ours = {
        "logits": logits,
        "fc_norm": seen["fc_norm"]["__call__"][0],
        "pooled": seen["encoder"]["pool"]["__call__"][0][0],
    }
    if config.merges_tokens:
        normed = seen["down_norm"]["__call__"][0]
        ours["down_norm"] = normed if config.merge_norm == "LN" else normed.swapaxes(1, 2)
    assert ours.keys() <= case.outputs.keys()
    for name, value in ours.items():
        goldens.assert_close(value, case.outputs[name], goldens.OUTPUT_LIMIT, name)
    assert abs(loss - case.loss) < goldens.LOSS_LIMIT

    torch_grads = torch_keys.to_torch(grads, entries)
    assert case.grads
    for key, reference in case.grads.items():
        goldens.assert_close(torch_grads[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")


def test_trunk_intermediates(case):
    config = goldens.classifier_config(case)
    encoder = VideoEncoder(config.encoder)
    params = {"params": goldens.classifier_params(case, config)["encoder"]}

    @jax.jit
    def run(params, video):
        patches = encoder.apply(params, video, method="embed_patches")
        first = encoder.apply(params, video, method="embed")
        return patches, first, encoder.apply(params, video, return_layers=(0, -1))

    patches, first, out = run(params, case.video)
    for name, value in (
        ("patch_embed", patches.reshape(case.outputs["patch_embed"].shape)),
        ("block0_in", first),
        ("block0", out.features[0]),
        ("block_last", out.features[1]),
    ):
        goldens.assert_close(value, case.outputs[name], goldens.OUTPUT_LIMIT, name)


def test_weights_come_back_bit_by_bit(case):
    config = goldens.classifier_config(case)
    tensors = torch_keys.to_torch(goldens.classifier_params(case, config), classifier_map(config))
    assert tensors.keys() == case.weights.keys()
    for key, reference in case.weights.items():
        assert tensors[key].dtype == reference.dtype, key
        np.testing.assert_array_equal(tensors[key], reference, err_msg=key)


@pytest.mark.torch
def test_torch_module(case):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import classifier as torch_models

    config = goldens.classifier_config(case)
    contents = {"kind": "classifier", "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents, fused_attention=False)
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in case.weights.items()})
    logits = model(torch.from_numpy(case.inputs["video"].copy()))
    goldens.assert_close(logits.detach(), case.outputs["logits"], goldens.OUTPUT_LIMIT, "logits")
    target = torch.from_numpy(case.inputs["soft_target"].copy())
    torch.nn.functional.cross_entropy(logits, target).backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    for key, reference in case.grads.items():
        goldens.assert_close(gradients[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")
