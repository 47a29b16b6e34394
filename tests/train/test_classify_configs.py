"""Shipped fine-tuning configs: parameter counts, rates and groups are the recipes'."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.interop.torch_keys.classifier import classifier_map
from iv2_jax.models.classifier import ZOO
from iv2_jax.train import loop, optim

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "finetune"

# Parameters (spec stage1 1).
COUNTS = {
    "classify.py:small,k400": 23_352_976,
    "classify.py:base,k400": 89_748_112,
    "classify.py:large,k400": 309_238_416,
    "classify.py:1b,k400": 1_021_017_744,
    "classify.py:6b,k400": 5_942_044_304,
    "classify.py:1b,k710": 1_021_256_134,
    "classify.py:6b,k710": 5_942_282_694,
    "classify.py:1b,k400,16": 1_023_901_328,
    "classify.py:6b,k400,16": 5_948_597_904,
    "probe.py:1b,ap_ssv2": 1_028_451_502,
    "probe.py:6b,ap_ssv2": 5_953_148_078,
    "probe.py:1b,lp_ssv2": 1_027_082_926,
    "probe.py:6b,lp_ssv2": 5_953_155_758,
}
# Effective peak learning rates (spec stage1 6.3; probes: rate x batch / 256).
RATES = {
    "classify.py:1b,k710": 1e-4,
    "classify.py:6b,k710": 5e-5,
    "classify.py:small,k710": 4e-4,
    "classify.py:1b,k600": 2e-5,
    "classify.py:6b,k700": 2e-5,
    "classify.py:6b,k700,16": 1e-5,
    "classify.py:base,k400": 1.6e-4,
    "classify.py:1b,mit": 5e-5,
    "classify.py:6b,mit": 2.5e-5,
    "classify.py:1b,ssv2": 2e-4,
    "classify.py:6b,ssv2": 1.5e-4,
    "classify.py:small,ssv2": 1e-3,
    "classify.py:1b,ssv1": 2e-4,
    "probe.py:1b,ap_k710": 8e-4,
    "probe.py:6b,lp_k400": 2e-3,
    "probe.py:1b,lp_hmdb51": 4e-3,
}


def _read(name):
    return loop.read_config(str(CONFIGS / name), {})


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    entries = classifier_map(_read(name).classifier)
    sizes = (math.prod(e.torch_shape) * len(e.torch_keys) for e in entries)
    assert sum(sizes) == COUNTS[name]


@pytest.mark.parametrize("name", RATES)
def test_rates(name):
    config = _read(name)
    schedule = optim.learning_rate(config.optimizer, config.steps, config.batch_size)
    peak = max(float(schedule(config.optimizer.warmup_steps)), 0.0)
    assert peak == pytest.approx(RATES[name], rel=1e-5)


def test_layer_decay_is_the_spec_s():
    for size, wanted in (("1b", (0.0133, 0.0148, 0.9)), ("6b", (0.0129, 0.0141, 0.915))):
        (_, embeddings), (_, blocks) = _read(f"classify.py:{size},k710").optimizer.lr_multipliers
        assert (embeddings, blocks[0], blocks[-1]) == pytest.approx(wanted, abs=5e-5)


def test_models_and_views():
    config = _read("classify.py:6b,ssv2")
    assert config.classifier.encoder.drop_path_rate == 0.4
    assert (config.test_views, config.test_crops) == (5, 3)
    assert not config.data.flip
    assert config.data.sampling == "frames"
    zoo = ZOO["internvideo2_1b_k400_f16"]
    ours = _read("classify.py:1b,k400,16").classifier
    assert (ours.encoder.grid, ours.num_classes) == (zoo.encoder.grid, zoo.num_classes)
    assert ours.encoder.drop_path_rate == zoo.encoder.drop_path_rate
    assert ours.encoder.remat == "named"
    assert _read("classify.py:6b,k400").classifier.encoder.remat == "full"  # 16 GB hold no more
    assert _read("probe.py:1b,lp_k400").optimizer.open == ()


@pytest.mark.parametrize("arg", ["1b,k4000", "2b,k400", "1b,k400,12", "small,mit"])
def test_unknown_arguments_are_refused(arg):
    with pytest.raises(ConfigError, match=r"classify\.py"):
        _read(f"classify.py:{arg}")
