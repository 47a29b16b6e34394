"""Our PyTorch CLIP modules give what the JAX models give, from the exported tensors."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.clip import clip_map
from iv2_jax.models import kinds
from iv2_jax.models.clip import ZOO, Clip
from iv2_jax.models.lora import LoraConfig
from iv2_jax.objectives.contrastive import similarity

pytestmark = pytest.mark.torch

LARGE, SMALL = ZOO["test_tiny_clip"], ZOO["test_tiny_clip_small"]
ADAPTED = dataclasses.replace(
    LARGE, text=LARGE.text.with_lora(LoraConfig(rank=2, alpha=3.0), ("q", "k", "down"))
)
GROUPED = dataclasses.replace(
    LARGE,
    text=dataclasses.replace(
        LARGE.text, decoder=dataclasses.replace(LARGE.text.decoder, num_kv_heads=2)
    ),
)
BOTH_WAYS = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, causal=False))
IDS = np.array([[1, 7, 11, 39, 2, 0, 0], [1, 2, 0, 0, 0, 0, 0]])


def _random(entries):
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(
            rng.normal(path[-1].key in ("scale", "temp"), 0.2, leaf.shape), np.float32
        ),
        torch_keys.abstract_params(entries),
    )


@pytest.mark.parametrize(
    "config",
    [LARGE, ADAPTED, GROUPED, SMALL, BOTH_WAYS],
    ids=["large", "lora", "grouped", "small", "both-ways"],
)
def test_outputs_agree(config):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import clip as torch_models

    entries = clip_map(config)
    params = _random(entries)
    contents = {"kind": kinds.of(config).name, "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents)
    tensors = torch_keys.to_torch(params, entries)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    video = np.random.default_rng(1).normal(size=(2, 4, 56, 56, 3)).astype(np.float32)

    ours = jax.jit(lambda p, v: Clip(config).apply({"params": p}, v, IDS))(params, video)
    with torch.no_grad():
        theirs = model(torch.from_numpy(video.transpose(0, 4, 1, 2, 3)), torch.from_numpy(IDS))
    scores = similarity(ours.vision, ours.text, ours.temperature)
    for mine, other in (
        (ours.vision, theirs.vision),
        (ours.text, theirs.text),
        (scores, theirs.similarity),
    ):
        other = other.numpy()
        assert np.abs(mine - other).max() < 1e-5 * np.abs(other).max()


@pytest.mark.parametrize("config", [LARGE, SMALL], ids=["large", "small"])
def test_a_text_tower_is_exported_alone(config):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import clip as torch_models

    kind = kinds.of(config.text).name
    model = torch_models.from_config({"kind": kind, "model": config_lib.to_dict(config.text)})
    whole = torch_keys.torch_shapes(clip_map(config))
    prefix = "text_encoder."
    wanted = {k.removeprefix(prefix): s for k, s in whole.items() if k.startswith(prefix)}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == wanted
    assert model(torch.from_numpy(IDS)).shape == (2, config.text.out_width)


def test_another_kind_is_refused():
    pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import clip as torch_models

    with pytest.raises(ValueError, match="clip_small"):
        torch_models.from_config({"kind": "student", "model": {}})
