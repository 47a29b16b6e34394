"""The audio front end and BEATs against the original: features, tokens, biases and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.data import fbank
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.audio import beats_map
from iv2_jax.models.audio.beats import Beats
from iv2_jax.models.audio.beats_layers import relative_buckets
from tests.parity import goldens, stage2_goldens

FBANK_LIMIT = 2e-4  # absolute: logarithms of small energies
MELS = (64, 128)


@pytest.fixture(scope="module")
def case(golden):
    return golden("s2_beats")


@pytest.fixture(scope="module")
def model(case):
    """Config and parameters of the case."""
    config = stage2_goldens.beats_config(case.meta["ctor"])
    return config, torch_keys.from_torch(case.weights, beats_map(config), source=case.name)


@pytest.mark.parametrize("num_mels", MELS)
def test_fbank(case, num_mels):
    ours = fbank.fbank(case.inputs["waveform"], num_mels)
    reference = case.outputs[f"fbank_mel{num_mels}"]
    assert ours.shape == reference.shape
    assert ours.dtype == np.float32
    assert np.abs(ours - reference).max() < FBANK_LIMIT


@pytest.mark.parametrize("num_mels", MELS)
def test_tokens(case, model, num_mels):
    config, params = model
    features = case.outputs[f"fbank_mel{num_mels}"]
    out = jax.jit(lambda p, x: Beats(config).apply({"params": p}, x))(params, features)
    reference = case.outputs[f"mel{num_mels}/features"]
    goldens.assert_close(out.tokens, reference, goldens.OUTPUT_LIMIT, "tokens")
    goldens.assert_close(out.pooled, reference.mean(axis=1), goldens.OUTPUT_LIMIT, "pooled")


def test_waveform_to_tokens(case, model):
    config, params = model
    features = fbank.fbank(case.inputs["waveform"])
    out = Beats(config).apply({"params": params}, features)
    # The features' own tolerance is the larger part of the difference.
    goldens.assert_close(out.tokens, case.outputs["mel64/features"], FBANK_LIMIT, "tokens")


def test_named_intermediates(case, model):
    config, params = model
    beats, variables = Beats(config), {"params": params}
    features = case.outputs["fbank_mel64"]
    patches = beats.apply(variables, features, method="embed_patches")
    embedded = beats.apply(variables, features, method="embed")
    norm = beats.bind(variables).patch_norm(patches)
    conv = beats.bind(variables).pos_conv(embedded)
    first = beats.apply(variables, features, return_layers=(0,)).features[0]
    bias = beats.bind(variables).relative_bias(embedded.shape[1])
    by_freq = patches.shape[0], *case.outputs["mel64/patch_embed_conv"].shape[2:], -1
    ours = {
        "mel64/patch_embed_conv": patches.reshape(by_freq).transpose(0, 3, 1, 2),
        "mel64/layer_norm": norm,
        "mel64/post_extract_proj": embedded,
        "mel64/pos_conv": conv.swapaxes(1, 2),
        "mel64/layer0_T_B_C": first.swapaxes(0, 1),
        "rel_pos_bias_H_Q_K": bias,
    }
    for name, value in ours.items():
        goldens.assert_close(value, case.outputs[name], goldens.OUTPUT_LIMIT, name)
    reference = case.outputs["rel_pos_bucket"]
    rows = relative_buckets(len(reference), config.num_buckets, config.max_distance)
    np.testing.assert_array_equal(rows, reference)


def _loss(tokens):
    """The golden's: weighted squares of the features."""
    weight = jnp.linspace(-1, 1, tokens.shape[-1], dtype=jnp.float32)
    return jnp.mean((tokens * weight) ** 2)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_loss_and_gradients(case, model, remat):
    config, params = model
    config = config_lib.build(type(config), config_lib.to_dict(config) | {"remat": remat})
    features = case.outputs["fbank_mel64"]

    def loss_fn(params):
        return _loss(Beats(config).apply({"params": params}, features).tokens)

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    assert abs(loss - case.loss) < goldens.LOSS_LIMIT
    torch_grads = torch_keys.to_torch(grads, beats_map(config))
    assert case.grads
    for key, reference in case.grads.items():
        goldens.assert_close(torch_grads[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")


@pytest.mark.torch
def test_torch_restatement(case, model):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import audio

    contents = {"kind": "beats", "model": config_lib.to_dict(model[0])}
    network = audio.from_config(contents)
    # Strict, with the original's own names: nothing missing, nothing left over.
    network.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in case.weights.items()})
    tokens = network(torch.from_numpy(case.outputs["fbank_mel64"].copy()))
    goldens.assert_close(
        tokens.detach(), case.outputs["mel64/features"], goldens.OUTPUT_LIMIT, "tokens"
    )
    ((tokens * torch.linspace(-1, 1, tokens.shape[-1])) ** 2).mean().backward()
    gradients = {name: value.grad for name, value in network.named_parameters()}
    for key in case.grads:
        goldens.assert_close(gradients[key], case.grads[key], goldens.GRAD_LIMIT, key)
