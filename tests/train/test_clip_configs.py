"""The CLIP recipes train exactly what spec stage2 7.1 says, with its decay groups."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.models import kinds
from iv2_jax.parallel.rules import path_name
from iv2_jax.train import loop, optim

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "clip"
TRAINED = {
    "internvideo2_clip.py:1b": 7_042_177,
    "internvideo2_clip.py:6b": 33_207_169,
    "internvideo2_clip_small.py:small": 1_136_769,
    "internvideo2_clip_small.py:base": 2_762_241,
    "internvideo2_clip_small.py:large": 4_337_409,
}


def _trained(config):
    """Shapes of the trained parameters by path, and the tree of decay multipliers."""
    params = kinds.of(config.model).abstract_params(config.model)
    on = optim.trainable(config.optimizer, params)
    decay = optim.decay_multipliers(config.optimizer, params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        path_name(path): (leaf.shape, multiplier)
        for (path, leaf), keep, multiplier in zip(
            leaves, jax.tree.leaves(on), jax.tree.leaves(decay), strict=True
        )
        if keep
    }


@pytest.mark.parametrize("name", TRAINED)
def test_trained_parameters_and_their_decay(name):
    config = loop.read_config(str(FOLDER / name), {})
    trained = _trained(config)
    assert sum(math.prod(shape) for shape, _ in trained.values()) == TRAINED[name]
    decayed = {path for path, (_, multiplier) in trained.items() if multiplier}
    pool = {f"vision_encoder/pool/{part}/kernel" for part in ("q", "k", "v", "proj")}
    small = "small" in name
    assert decayed == pool | ({"vision_align/proj/kernel"} if small else set())
    assert config.optimizer.weight_decay == 0.2
    assert config.optimizer.clip_norm == 0
    assert config.loss.frame_tokens == (2 if small else 5)


def test_adapters_are_opened():
    config = loop.read_config(str(FOLDER / "internvideo2_clip.py:1b,lora"), {})
    trained = _trained(config)
    adapters = {path for path in trained if path.startswith("text_encoder/")}
    assert {path.rsplit("/", 1)[1] for path in adapters} == {"lora_a", "lora_b"}
    # q and v of 32 layers, rank 16 (spec stage2 7.2).
    values = sum(math.prod(trained[path][0]) for path in adapters)
    assert values == 32 * 2 * 2 * 4096 * 16


def test_paths_are_set_by_number():
    changes = {"init.1.path": "mine.pt", "data.media.video.num_workers": "3"}
    config = loop.read_config(str(FOLDER / "internvideo2_clip_small.py:small"), changes)
    assert [init.path for init in config.init] == ["S14_dist_1B_stage2.pth", "mine.pt"]
    assert config.data.media["video"].num_workers == 3
    for field, message in (
        ("init.2.path", "entries 0 to 1"),
        ("data.media.x.y.z", "config.data.media.x.y"),
        ("init.1.pth", "did you mean 'path'"),
    ):
        with pytest.raises(ConfigError, match=message):
            loop.read_config(str(FOLDER / "internvideo2_clip_small.py:small"), {field: "x"})


def test_arguments_that_are_none():
    for name in ("internvideo2_clip.py:1b,ful", "internvideo2_clip_small.py:large,poll"):
        with pytest.raises(ConfigError, match="did you mean"):
            loop.read_config(str(FOLDER / name), {})
