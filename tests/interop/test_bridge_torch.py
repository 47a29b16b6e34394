"""Our PyTorch bridge against the Flax one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.chat import bridge_map
from iv2_jax.models import bridge as bridge_lib
from iv2_jax.models.bridge import Bridge

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the torch extra")
from iv2_jax.interop.torch_models import bridge as torch_models  # noqa: E402 (needs torch)

TINY = bridge_lib.ZOO["test_tiny_bridge"]


def _models(config, seed=0):
    """Parameters, and the PyTorch bridge that holds them too."""
    entries = bridge_map(config)
    rng = np.random.default_rng(seed)
    abstract = torch_keys.abstract_params(entries)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype("f4"), abstract)
    contents = {"kind": "bridge", "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents)
    state = torch_keys.to_torch(params, entries)
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()})
    return params, model


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, text=False, project_down=False, num_extra_queries=0),
        dataclasses.replace(TINY, depth=2, cross_every=3),
        dataclasses.replace(TINY, depth=2, cross_every=1),
    ],
    ids=["default", "no text", "tail alone", "cross everywhere"],
)
def test_outputs(config):
    params, model = _models(config)
    rng = np.random.default_rng(1)
    context = rng.normal(size=(2, 7, config.context_width)).astype(np.float32)
    inputs = [context]
    if config.text:
        inputs += [rng.integers(0, config.vocab_size, (2, 5)), np.array([[1] * 5, [0, 0, 1, 1, 1]])]
    ours = jax.jit(Bridge(config).apply)({"params": params}, *inputs)
    with torch.no_grad():
        theirs = model(*(torch.from_numpy(value) for value in inputs))
    for name in ("tokens", "hidden"):
        reference = np.asarray(getattr(ours, name))
        error = np.abs(getattr(theirs, name).numpy() - reference).max() / np.abs(reference).max()
        assert error < 1e-5, name


def test_masked_context_and_no_text():
    params, model = _models(TINY)
    context = np.random.default_rng(1).normal(size=(2, 7, TINY.context_width)).astype(np.float32)
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    ours = Bridge(TINY).apply({"params": params}, context, context_mask=mask).tokens
    with torch.no_grad():
        theirs = model(torch.from_numpy(context), context_mask=torch.from_numpy(mask)).tokens
        short = model(torch.from_numpy(context[1:, :4])).tokens
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())
    np.testing.assert_allclose(short[0], ours[1], atol=1e-5 * np.abs(ours).max())


def test_misuse_is_refused():
    _, model = _models(dataclasses.replace(TINY, text=False))
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="reads no text"):
        model(torch.zeros(1, 3, TINY.context_width), ids)
    with pytest.raises(ValueError, match="'encoder'"):
        torch_models.from_config({"kind": "encoder", "model": {}})
