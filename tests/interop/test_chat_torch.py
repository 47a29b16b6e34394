"""Our PyTorch dialogue model against the Flax one: videos, images, views, adapters."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.chat import chat_map
from iv2_jax.models import chat as chat_lib
from iv2_jax.models.chat import Chat
from iv2_jax.models.lora import LoraConfig

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the torch extra")
from iv2_jax.interop.torch_models import chat as torch_models  # noqa: E402 (needs torch)

TINY = chat_lib.ZOO["test_tiny_chat"]
LORA = dataclasses.replace(
    TINY, llm=TINY.llm.with_lora(LoraConfig(3, 6.0), head=True), bos_as_number=True
)
FEATURES = dataclasses.replace(
    LORA, encoder=None, bridge=dataclasses.replace(TINY.bridge, project_down=False)
)
COUNT = TINY.bridge.num_tokens


def _models(config):
    """Parameters, and the PyTorch model that holds them too, loaded strictly."""
    entries = chat_map(config)
    rng = np.random.default_rng(0)
    abstract = torch_keys.abstract_params(entries)
    params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype("f4"), abstract)
    contents = {"kind": "chat", "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents, fused_attention=False)
    state = torch_keys.to_torch(params, entries)
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()})
    # What the module saves is what it was given, name by name.
    assert model.state_dict().keys() == state.keys()
    return params, model


@pytest.mark.parametrize(
    ("config", "views", "frames"),
    [(TINY, 3, 2), (LORA, 1, 1), (FEATURES, 2, 0)],
    ids=["views of a video", "image, adapters, released first position", "features"],
)
def test_outputs(config, views, frames):
    params, model = _models(config)
    rng = np.random.default_rng(1)
    length = 4 + views * COUNT + 5
    tokens = rng.integers(1, TINY.llm.vocab_size, (2, length)).astype(np.int32)
    index = np.full((2, length), -1, np.int32)
    index[:, 4 : 4 + views * COUNT] = np.arange(views * COUNT)
    mask = np.ones((2, length), bool)
    mask[1, -3:] = False
    media = {
        "bridge_ids": rng.integers(0, TINY.bridge.vocab_size, (2, 4)),
        "bridge_mask": np.array([[1] * 4, [0, 0, 1, 1]]),
    }
    if frames:
        media["video"] = rng.normal(size=(2, views, frames, 28, 28, 3)).astype(np.float32)
    else:
        media["features"] = rng.normal(size=(2, views, 6, 32)).astype(np.float32)
    ours = jax.jit(Chat(config).apply)({"params": params}, tokens, index, mask, **media)
    if frames:
        media["video"] = media["video"].transpose(0, 1, 5, 2, 3, 4).copy()
    inputs = [torch.from_numpy(value) for value in (tokens.astype(np.int64), index, mask)]
    inputs[1] = inputs[1].long()
    with torch.no_grad():
        theirs = model(*inputs, **{name: torch.from_numpy(x) for name, x in media.items()})
    for name in ("visual", "embeddings", "logits"):
        real = slice(None) if name == "visual" else mask
        reference = np.asarray(getattr(ours, name))[real]
        error = np.abs(getattr(theirs, name).numpy()[real] - reference).max()
        assert error < 1e-5 * np.abs(reference).max(), name


def test_text_alone_and_another_kind():
    params, model = _models(TINY)
    tokens = np.array([[1, 5, 9, 3]], np.int32)
    index = np.full((1, 4), -1, np.int32)
    ours = Chat(TINY).apply({"params": params}, tokens, index).logits
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long(), torch.from_numpy(index).long()).logits
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())
    with pytest.raises(ValueError, match="'llm'"):
        torch_models.from_config({"kind": "llm", "model": {}})
