from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import kinds, zoo
from iv2_jax.models.clip import ZOO, Clip
from iv2_jax.models.layers import Precision
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.text.llama_clip import LlamaClipConfig, LlamaClipText

LARGE, SMALL = ZOO["test_tiny_clip"], ZOO["test_tiny_clip_small"]
IDS = np.array([[1, 7, 11, 39, 2, 0, 0], [1, 2, 0, 0, 0, 0, 0]])

# Counts of the original's classes built without memory (spec stage2 section 1).
COUNTS = {
    "internvideo2_clip_1b": 7_704_737_537,
    "internvideo2_clip_6b": 12_625_764_097,
    "internvideo2_clip_small": 86_867_201,
    "internvideo2_clip_base": 153_262_337,
    "internvideo2_clip_large": 372_752_641,
    "llama_clip_7b_text": 6_684_028_928,
    "mobileclip_b_text": 63_428_096,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert zoo.count_params(zoo.get(name)) == COUNTS[name]


def _video(frames=4, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, frames, 56, 56, 3))


def _random(config, seed=0):
    """Parameters far from where they start, so that every one of them matters."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(
            rng.normal(path[-1].key in ("scale", "temp"), 0.2, leaf.shape), np.float32
        ),
        zoo.abstract_params(config),
    )


@pytest.fixture(scope="module", params=[LARGE, SMALL], ids=["large", "small"])
def model(request):
    """A config with random parameters."""
    return request.param, _random(request.param)


def _apply(model, *args, method=None, **kwargs):
    config, params = model
    run = jax.jit(lambda p, *a: Clip(config).apply({"params": p}, *a, method=method, **kwargs))
    return run(params, *args)


def test_both_towers_end_in_one_space(model):
    out = _apply(model, _video(), IDS)
    assert out.vision.shape == out.text.shape == (2, model[0].text.out_width)
    assert jnp.isfinite(out.vision).all()
    assert out.temperature.dtype == jnp.float32


def test_images_are_placed_by_the_mean_over_time(model):
    config, params = model
    image = _apply(model, _video(1), method="encode_vision")
    table = params["vision_encoder"]["pos_embed"]
    mean = table[:, 1:].reshape(1, 4, 16, -1).mean(axis=1)
    one_frame = dataclasses.replace(config.vision, num_frames=1)
    vision = {**params["vision_encoder"], "pos_embed": jnp.concatenate([table[:, :1], mean], 1)}
    single = (dataclasses.replace(config, vision=one_frame), {**params, "vision_encoder": vision})
    expected = _apply(single, _video(1), method="encode_vision")
    np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.02, 0.01, 0.001])
def test_the_floor_of_the_temperature_lets_its_gradient_pass(value):
    config = dataclasses.replace(SMALL, temp_min=0.01)

    def temperature(temp):
        return Clip(config).apply({"params": {"temp": temp}}, method="temperature")

    result, gradient = jax.value_and_grad(temperature)(jnp.float32(value))
    assert result == pytest.approx(max(value, 0.01))
    assert gradient == 1.0


def test_the_temperature_starts_at_the_configs_value():
    model = Clip(dataclasses.replace(SMALL, temp_init=0.07))
    params = model.init(jax.random.key(0), method="temperature")["params"]
    assert meta.unbox(params)["temp"] == np.float32(0.07)


def test_bfloat16_activations_keep_float32_parameters_and_temperature(model):
    config, params = model
    precision = Precision(compute_dtype="bfloat16")
    vision = dataclasses.replace(config.vision, precision=precision)
    if hasattr(config.text, "decoder"):
        decoder = dataclasses.replace(config.text.decoder, precision=precision)
        text = dataclasses.replace(config.text, decoder=decoder)
    else:
        text = dataclasses.replace(config.text, precision=precision)
    half = dataclasses.replace(config, vision=vision, text=text)
    out, full = _apply((half, params), _video(), IDS), _apply(model, _video(), IDS)
    assert out.vision.dtype == out.text.dtype == jnp.bfloat16
    assert out.temperature.dtype == jnp.float32
    for ours, reference in ((out.vision, full.vision), (out.text, full.text)):
        assert np.abs(ours - reference).max() < 0.05 * np.abs(reference).max()


@pytest.mark.parametrize("config", [LARGE, SMALL], ids=["large", "small"])
def test_every_parameter_has_axis_names(config):
    params = kinds.of(config).boxed_params(config)
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)):
        assert isinstance(leaf, meta.AxisMetadata)
        assert len(leaf.names) == leaf.value.ndim


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LARGE, {"temp_min": 0.0}, "temp_min=0.0"),
        (SMALL, {"temp_init": -1.0}, "temp_init=-1.0"),
        (SMALL, {"vision": dataclasses.replace(SMALL.vision, pool=False)}, "pool=False"),
        (LARGE, {"text": LlamaClipConfig()}, "pool_width=24 must be text.out_width=768"),
    ],
)
def test_bad_configs_name_the_field(config, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **change)


# The LLaMA-style text tower


@pytest.fixture(scope="module")
def text_params():
    return _random(LARGE.text)


def _text(params, ids, config=LARGE.text, rngs=None, **kwargs):
    run = jax.jit(lambda p, i: LlamaClipText(config).apply({"params": p}, i, rngs=rngs, **kwargs))
    return run(params, jnp.asarray(ids))


def test_the_last_real_token_is_pooled(text_params):
    out = _text(text_params, IDS)
    picked = out.tokens[jnp.arange(2), jnp.array([4, 1])]
    np.testing.assert_allclose(
        out.pooled, picked @ text_params["proj"]["kernel"], rtol=1e-5, atol=1e-5
    )


def test_padding_changes_no_feature(text_params):
    shorter = _text(text_params, IDS[:, :5]).pooled
    np.testing.assert_allclose(_text(text_params, IDS).pooled, shorter, rtol=1e-5, atol=1e-5)


def test_later_tokens_do_not_change_earlier_ones(text_params):
    changed = IDS.copy()
    changed[0, 4:] = [20, 21, 22]
    np.testing.assert_allclose(
        _text(text_params, changed).tokens[0, :4],
        _text(text_params, IDS).tokens[0, :4],
        rtol=1e-5,
        atol=1e-5,
    )


def test_features_are_those_of_the_asked_blocks(text_params):
    features = _text(text_params, IDS, return_layers=(0, 1)).features
    last = _text(text_params, IDS, return_layers=(-1,)).features
    np.testing.assert_array_equal(last[0], features[1])
    np.testing.assert_array_equal(
        _text(text_params, IDS, return_layers=(-1,)).features[0], features[1]
    )
    assert features.shape == (2, 2, 7, 32)


def test_adapters_start_as_nothing_and_have_dropout_in_training():
    config = LARGE.text.with_lora(LoraConfig(rank=2, alpha=4.0, dropout=0.5))
    init = jax.jit(lambda key: LlamaClipText(config).init(key, IDS)["params"])
    params = meta.unbox(init(jax.random.key(0)))
    attention = params["decoder"]["blocks"]["attn"]
    assert {name: "lora_a" in attention[name] for name in "qkvo"} == {
        "q": True,
        "k": False,
        "v": True,
        "o": False,
    }
    start = _text(params, IDS, config).pooled
    for name in "qv":
        attention[name]["lora_b"] = jnp.ones_like(attention[name]["lora_b"])
    changed = _text(params, IDS, config).pooled
    assert jnp.abs(changed - start).max() > 1e-4
    rngs = {"dropout": jax.random.key(1)}
    dropped = _text(params, IDS, config, train=True, rngs=rngs).pooled
    assert jnp.abs(dropped - changed).max() > 1e-5
    assert config.without_lora() == LARGE.text


def test_an_unknown_id_gives_nan(text_params):
    assert jnp.isnan(_text(text_params, [[1, 96, 2]]).pooled).all()
