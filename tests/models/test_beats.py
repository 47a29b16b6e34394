"""BEATs: shapes, its relative positions, dropout, rematerialisation and what it refuses."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import kinds
from iv2_jax.models.audio.beats import ZOO, Beats
from iv2_jax.models.audio.beats_layers import PositionConv, relative_buckets

TINY = ZOO["test_tiny_beats"]


def _features(batch=2, frames=24, mels=8, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, frames, mels)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    """Random parameters, norms and gates included."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if path[-1].key in ("scale", "gate_scale", "weight_g") else 0.0
        return (around + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, kinds.of(TINY).abstract_params(TINY))


@partial(jax.jit, static_argnames=("config", "return_layers", "train"))
def _run(params, features, config=TINY, return_layers=(), train=False, key=None):
    return Beats(config).apply(
        {"params": params},
        features,
        return_layers=return_layers,
        train=train,
        rngs=None if key is None else {"dropout": key},
    )


def test_grid_and_tokens():
    assert ZOO["beats_iter3"].grid == (62, 4)
    assert ZOO["beats_iter3"].num_tokens == 248
    assert TINY.grid == (6, 2)


def test_outputs(params):
    out = _run(params, _features(), return_layers=(0, -1))
    assert out.tokens.shape == (2, 12, 24)
    assert out.pooled.shape == (2, 24)
    assert out.features.shape == (2, 2, 12, 24)
    np.testing.assert_array_equal(out.features[1], out.tokens)
    np.testing.assert_allclose(out.pooled, out.tokens.mean(axis=1), atol=1e-6)


def test_a_rest_smaller_than_a_patch_does_not_count(params):
    features = _features(frames=26, mels=11)
    whole = _run(params, features).tokens
    np.testing.assert_array_equal(whole, _run(params, features[:, :24, :8]).tokens)


def test_tokens_are_time_major(params):
    features = _features()
    changed = features.copy()
    changed[:, 8:12, 4:] += 1.0  # third patch in time, second in frequency
    patches = [
        Beats(TINY).apply({"params": params}, x, method="embed_patches")
        for x in (features, changed)
    ]
    moved = np.abs(np.asarray(patches[0] - patches[1])).max(axis=(0, 2)) > 0
    assert np.flatnonzero(moved).tolist() == [2 * 2 + 1]


def test_rows_do_not_see_each_other(params):
    features = _features()
    np.testing.assert_allclose(
        _run(params, features).tokens[1], _run(params, features[1:]).tokens[0], atol=1e-5
    )


def test_buckets():
    rows = relative_buckets(30, 8, 20)
    np.testing.assert_array_equal(np.diag(rows), 0)
    assert rows[5, 4] == 1  # one behind: its own bucket
    assert rows[4, 5] == 4 + 1  # one ahead: the same, in the other half
    assert rows[25, 0] == rows[29, 0] == 3  # beyond max_distance: the last
    assert rows[0, 25] == 7
    assert rows.max() < 8
    assert (np.diff(rows[29, ::-1]) >= 0).all()


def test_the_bias_depends_on_distance_alone(params):
    bias = Beats(TINY).bind({"params": params}).relative_bias(9)
    assert bias.shape == (2, 9, 9)
    np.testing.assert_array_equal(bias[:, 1:, 1:], bias[:, :-1, :-1])


def test_the_bias_and_its_gate_take_part(params):
    features = _features()
    plain = _run(params, features).tokens
    for path in (("relative_bias",), ("layers", "attn", "gate_scale")):
        changed = jax.tree.map(lambda x: x, params)
        node = changed
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = node[path[-1]] + jnp.arange(node[path[-1]].size).reshape(
            node[path[-1]].shape
        )
        assert np.abs(_run(changed, features).tokens - plain).max() > 1e-3, path


@pytest.mark.parametrize("taps", [4, 5])
def test_position_convolution_is_the_written_out_sum(taps):
    config = dataclasses.replace(TINY, width=4, num_heads=2, conv_taps=taps, conv_groups=2)
    x = np.random.default_rng(0).normal(size=(1, 7, 4)).astype(np.float32)
    conv = PositionConv(config)
    tree = meta.unbox(conv.init(jax.random.key(0), x)["params"])
    tree = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(1), p.shape), tree)
    v, g, bias = (np.asarray(tree[name], np.float64) for name in ("weight_v", "weight_g", "bias"))
    kernel = g * v / np.sqrt((v**2).sum(axis=(1, 2), keepdims=True))
    expected = np.zeros((7, 4))
    for token in range(7):
        for tap in range(taps):
            source = token + tap - taps // 2
            if 0 <= source < 7:
                for out in range(4):
                    group = slice(2 * (out // 2), 2 * (out // 2) + 2)
                    expected[token, out] += x[0, source, group] @ kernel[tap, :, out]
    expected = jax.nn.gelu(expected + bias, approximate=False)
    np.testing.assert_allclose(conv.apply({"params": tree}, x)[0], expected, atol=1e-5)


def test_fresh_lengths_leave_the_drawn_directions():
    x = np.zeros((1, 3, TINY.width), np.float32)
    conv = meta.unbox(PositionConv(TINY).init(jax.random.key(0), x)["params"])
    lengths = np.sqrt((np.asarray(conv["weight_v"]) ** 2).sum(axis=(1, 2)))
    np.testing.assert_allclose(conv["weight_g"][:, 0, 0], lengths, rtol=1e-6)


def test_gradient_decay_changes_gradients_alone(params):
    features = _features()

    def loss(params, config):
        tokens = _run(params, features, config).tokens
        return jnp.sum(tokens * jnp.sin(jnp.arange(tokens.size)).reshape(tokens.shape))

    full = dataclasses.replace(TINY, gradient_decay=1.0)
    half = dataclasses.replace(TINY, gradient_decay=0.5)
    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    values, grads = zip(*(step(params, config) for config in (full, half)), strict=True)
    assert values[0] == values[1]
    # Only the last layer's own parameters lie behind no decay; the patches lie behind both.
    last = [g["layers"]["fc1"]["kernel"][1] for g in grads]
    first = [g["layers"]["fc1"]["kernel"][0] for g in grads]
    patches = [g["patch_embed"]["kernel"] for g in grads]
    np.testing.assert_allclose(last[1], last[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(first[1], 0.5 * first[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(patches[1], 0.25 * patches[0], rtol=1e-4, atol=1e-4)


def test_dropout_only_in_training(params):
    config = dataclasses.replace(TINY, dropout_rate=0.5, attention_dropout_rate=0.5)
    features = _features()
    plain = _run(params, features).tokens
    np.testing.assert_array_equal(_run(params, features, config).tokens, plain)
    draws = [
        _run(params, features, config, train=True, key=jax.random.key(seed)).tokens
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - plain).max() > 1e-2
    assert np.abs(draws[0] - draws[2]).max() > 1e-2


def test_layer_drop_skips_layers(params):
    config = dataclasses.replace(TINY, layer_drop=0.5)
    features = _features()
    layers = []
    for seed in range(8):
        key = jax.random.key(seed)
        out = _run(params, features, config, return_layers=(0, 1), train=True, key=key)
        layers.append(bool((out.features[0] == out.features[1]).all()))
    assert any(layers)
    assert not all(layers)


@partial(jax.jit, static_argnums=1)
def _gradients(params, config):
    return jax.grad(lambda p: jnp.sum(_run(p, _features(), config).tokens ** 3))(params)


@pytest.mark.parametrize("options", [{"remat": "dots"}, {"remat": "full"}, {"scan_unroll": 2}])
def test_memory_options_do_not_change_numbers(params, options):
    grads = [_gradients(params, c) for c in (TINY, dataclasses.replace(TINY, **options))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads)


def test_bfloat16_stays_near(params):
    config = dataclasses.replace(TINY, precision=dataclasses.replace(TINY.precision, **_BF16))
    out = _run(params, _features(), config)
    assert out.tokens.dtype == jnp.bfloat16
    reference = _run(params, _features()).tokens
    assert np.abs(np.asarray(out.tokens, np.float32) - reference).max() < 0.15


_BF16 = {"compute_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 25, "width=25 is not a multiple of num_heads=2"),
        ("conv_groups", 5, "not a multiple of conv_groups=5"),
        ("num_buckets", 7, "num_buckets=7: an even number"),
        ("max_distance", 2, "max_distance=2 must exceed"),
        ("dropout_rate", 1.0, "dropout_rate=1.0"),
        ("gradient_decay", 0.0, "gradient_decay=0.0"),
        ("num_mels", 3, "num_mels=3 is smaller than patch_size=4"),
        ("depth", 0, "depth=0"),
        ("remat", "some", "remat='some'"),
    ],
)
def test_misfits_are_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **{field: value})


def test_too_small_a_spectrogram_is_refused(params):
    with pytest.raises(ConfigError, match=r"fbank has shape \(2, 3, 8\)"):
        _run(params, _features(frames=3))
