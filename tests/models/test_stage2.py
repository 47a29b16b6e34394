"""The stage-2 models: which parts there are, what goes where, sub-clips, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.core import meta

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError
from iv2_jax.models import kinds
from iv2_jax.models.layers import Precision
from iv2_jax.models.stage2 import ZOO, Stage2, Stage2Config, join_tokens

VISUAL = ZOO["test_tiny_stage2"]
AUDIOVISUAL = ZOO["test_tiny_stage2_audiovisual"]


def _params(config):
    """Random parameters, drawn without compiling an initialisation."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        around = 1.0 if path[-1].key in ("scale", "gate_scale", "weight_g") else 0.0
        return (around + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32)

    tree = kinds.of(config).abstract_params(config)
    return jax.tree_util.tree_map_with_path(draw, tree)


@partial(jax.jit, static_argnames=("config", "method"))
def _run(config, params, *args, method=None, **inputs):
    return Stage2(config).apply({"params": params}, *args, method=method, **inputs)


def _inputs(config, batch=2):
    rng = np.random.default_rng(1)
    encoder = config.vision.encoder
    size = (batch, encoder.num_frames, encoder.image_size, encoder.image_size, 3)
    inputs = {
        "video": rng.normal(size=size).astype(np.float32),
        "ids": rng.integers(0, config.text.vocab_size, (batch, 6)),
        "mask": np.array([[1] * 6, [1] * 4 + [0] * 2])[:batch],
    }
    if config.audio is not None:
        shape = (batch, config.audio.num_frames, config.audio.num_mels)
        inputs["fbank"] = rng.normal(size=shape).astype(np.float32)
    return inputs


@pytest.fixture(scope="module", params=["test_tiny_stage2", "test_tiny_stage2_audiovisual"])
def model(request):
    """Config, parameters, inputs and outputs."""
    config = ZOO[request.param]
    params, inputs = _params(config), _inputs(config)
    return config, params, inputs, _run(config, params, **inputs)


def test_shapes(model):
    config, _, _, out = model
    encoder = config.vision.encoder
    assert out.vision.tokens.shape == (2, encoder.num_tokens, config.text.context_width)
    assert out.vision.pooled.shape == (2, encoder.pool_width)
    assert out.vision.joint.shape == out.text.joint.shape == (2, config.joint_width)
    assert out.vision.aligned.shape == (2, 2, encoder.num_tokens, 40)
    assert out.vision.aligned_final.shape == (2, 20)
    assert out.text.hidden.shape == (2, 6, config.text.width)
    assert out.match_logits.shape == (2, 2)
    if config.audio is None:
        assert out.audio is None
        assert out.audiovisual is None
    else:
        tokens = config.audio.num_tokens
        assert out.audio.tokens.shape == (2, tokens, config.text.context_width)
        assert out.audio.joint.shape == out.audiovisual.shape == (2, config.joint_width)


def test_padding_does_not_count(model):
    config, params, inputs, out = model
    ids = inputs["ids"].copy()
    ids[1, 4:] = 1
    changed = _run(config, params, **(inputs | {"ids": ids}))
    np.testing.assert_allclose(changed.match_logits, out.match_logits, atol=1e-5)
    np.testing.assert_allclose(changed.text.joint, out.text.joint, atol=1e-5)


def test_every_parameter_has_a_logical_name(model):
    boxed = kinds.of(model[0]).boxed_params(model[0])
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    leaves = jax.tree.leaves(boxed, is_leaf=is_box)
    assert all(map(is_box, leaves))
    for leaf in leaves:
        assert len(leaf.names) == len(meta.unbox(leaf).shape)
    blocks = boxed["text_encoder"]["fusion_layers"]["mlp"]["fc1"]["kernel"]
    assert blocks.names[0] == "layers"


@pytest.mark.parametrize("name", ZOO)
def test_configs_survive_a_file(name):
    config = ZOO[name]
    assert (
        config_lib.build(Stage2Config, json.loads(json.dumps(config_lib.to_dict(config)))) == config
    )


def test_training_draws_dropout_and_droppath(model):
    config, params, inputs, out = model
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(
            config.vision, encoder=dataclasses.replace(config.vision.encoder, drop_path_rate=0.5)
        ),
    )

    def run(key):
        rngs = {"droppath": key, "dropout": jax.random.fold_in(key, 1)}
        return Stage2(config).apply({"params": params}, **inputs, train=True, rngs=rngs)

    run = jax.jit(run)
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.abs(first.text.joint - other.text.joint).max() > 1e-4
    assert np.abs(first.vision.tokens - out.vision.tokens).max() > 1e-4


def test_bfloat16_activations_and_float32_logits_of_words(model):
    config = model[0]
    half = Precision(compute_dtype="bfloat16")
    encoder = dataclasses.replace(config.vision.encoder, precision=half)
    changes = {
        "vision": dataclasses.replace(config.vision, encoder=encoder),
        "text": dataclasses.replace(config.text, precision=half),
    }
    if config.audio is not None:
        changes["audio"] = dataclasses.replace(config.audio, precision=half)
    config = dataclasses.replace(config, **changes)

    def run(model, **inputs):
        out = model(**inputs)
        fused = model.fuse(out.vision.tokens, out.text.hidden, out.text.mask)
        return out, model.word_logits(fused), model.temp

    out, words, temp = jax.eval_shape(
        lambda params: Stage2(config).apply({"params": params}, method=run, **model[2]), model[1]
    )
    features = [out.vision, out.text] + ([] if out.audio is None else [out.audio])
    assert {x.joint.dtype for x in features} == {jnp.dtype("bfloat16")}
    assert out.vision.tokens.dtype == jnp.bfloat16
    assert words.dtype == temp.dtype == jnp.float32


def test_visible_tokens(model):
    config, params, inputs, _ = model
    visible = jnp.array([[0, 3, 5, 9], [0, 1, 2, 12]])
    out = _run(config, params, inputs["video"], visible, method="encode_vision")
    assert out.tokens.shape[1] == 4
    assert out.aligned.shape[2] == 4


def test_images(model):
    config, params, inputs, _ = model
    out = _run(config, params, inputs["video"][:, :1], method="encode_vision")
    grid = config.vision.encoder.image_grid
    assert out.tokens.shape[1] == 1 + grid[1] * grid[2]


def test_segments_are_interleaved_and_averaged(model):
    config, params, inputs, out = model
    other = _inputs(config)["video"][::-1] + 0.5
    both = np.stack([inputs["video"], other], axis=2)
    both = both.reshape(2, -1, *both.shape[3:])  # frames 0, 2, 4, ... are the first clip's
    encode = jax.jit(partial(Stage2(config).apply, num_segments=2, method="encode_segments"))
    segments = encode({"params": params}, both)
    second = _run(config, params, other, method="encode_vision")
    np.testing.assert_allclose(
        segments.tokens, (out.vision.tokens + second.tokens) / 2, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        segments.joint, (out.vision.joint + second.joint) / 2, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ConfigError, match="3 segments of num_frames=4 need 12 frames, got 8"):
        Stage2(config).bind({"params": params}).encode_segments(jnp.asarray(both), 3)


def test_words_are_guessed_from_media(model):
    config, params, _, out = model
    bound = Stage2(config).bind({"params": params})
    fused, others = (
        _run(config, params, tokens, out.text.hidden, out.text.mask, method="fuse")
        for tokens in (out.vision.tokens, out.vision.tokens[::-1])
    )
    logits = bound.word_logits(fused)
    assert logits.shape == (2, 6, config.text.vocab_size)
    assert np.abs(bound.word_logits(others) - logits).max() > 1e-4
    np.testing.assert_allclose(bound.match_logits(fused), out.match_logits, atol=1e-5)


def test_heads_by_media():
    config, params = AUDIOVISUAL, _params(AUDIOVISUAL)
    bound = Stage2(config).bind({"params": params})
    fused = jnp.ones((1, 2, config.text.width))
    logits = [np.asarray(bound.match_logits(fused, m)) for m in ("video", "audio", "audiovisual")]
    for name, value in zip(("itm_head", "atm_head", "avtm_head"), logits, strict=True):
        head = params[name]
        np.testing.assert_allclose(value[0], head["kernel"].sum(axis=0) + head["bias"], atol=1e-5)


def test_audio_comes_first():
    audio, vision = jnp.zeros((1, 2, 3)), jnp.ones((1, 4, 3))
    joined = join_tokens(audio, vision)
    assert joined[0, :, 0].tolist() == [0, 0, 1, 1, 1, 1]
    bound = Stage2(AUDIOVISUAL).bind({"params": (params := _params(AUDIOVISUAL))})
    width = AUDIOVISUAL.joint_width
    joint = bound.fuse_joint(jnp.ones((1, width)), jnp.zeros((1, width)))
    wanted = params["fusion"]["kernel"][:width].sum(axis=0) + params["fusion"]["bias"]
    np.testing.assert_allclose(joint[0], wanted, atol=1e-5)


def test_no_media_is_refused_by_a_model_without_it():
    bound = Stage2(VISUAL).bind({"params": _params(VISUAL)})
    with pytest.raises(ConfigError, match="no audio encoder"):
        bound.encode_audio(jnp.zeros((1, 24, 8)))
    with pytest.raises(ConfigError, match="av_fusion=False"):
        bound.fuse_joint(jnp.zeros((1, 20)), jnp.zeros((1, 20)))
    for media in ("audio", "speech"):
        with pytest.raises(ConfigError, match=f"media='{media}': this model has heads for video"):
            bound.match_logits(jnp.zeros((1, 2, VISUAL.text.width)), media)


def test_optional_parts_have_no_parameters_when_left_out():
    bare = dataclasses.replace(
        AUDIOVISUAL, audio=None, av_fusion=False, audio_matching=False, av_matching=False
    )
    paths = traverse_util.flatten_dict(kinds.of(bare).abstract_params(bare), sep="/")
    kept = {path.split("/")[0] for path in paths}
    assert kept == {
        "vision_encoder",
        "text_encoder",
        "vision_proj",
        "text_proj",
        "vision_tokens",
        "itm_head",
        "temp",
    }


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (VISUAL, {"joint_width": 0}, "joint_width=0"),
        (VISUAL, {"temp_init": 0.0}, "temp_init=0.0"),
        (VISUAL, {"text": AUDIOVISUAL.text}, "must be vision.encoder.width"),
        (VISUAL, {"av_fusion": True}, "av_fusion=True needs an audio encoder"),
        (VISUAL, {"audio": AUDIOVISUAL.audio}, "needs project_tokens=True"),
        (AUDIOVISUAL, {"av_fusion": False}, "av_matching=True needs av_fusion=True"),
    ],
)
def test_misfits_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **changes)
