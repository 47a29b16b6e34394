"""Bridge: what sees what, dropout and DropPath, and misuse."""

from __future__ import annotations

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import bridge as bridge_lib
from iv2_jax.models.bridge import Bridge, BridgeConfig

WITH_TAIL = bridge_lib.ZOO["test_tiny_bridge"]
TINY = dataclasses.replace(WITH_TAIL, depth=2)  # a group and no tail: less to compile


def _context(batch=2, length=6):
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, length, TINY.context_width)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return _init(TINY)


def _init(config):
    """Random parameters; only the shapes are the initialiser's, which saves compiling it."""
    rng = np.random.default_rng(0)
    tree = meta.unbox(jax.eval_shape(Bridge(config).init, jax.random.key(0), _context()))
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype("f4"), tree)


@functools.cache
def _jitted(config):
    return jax.jit(Bridge(config).apply, static_argnames="train")


def _apply(params, *args, config=TINY, **kwargs):
    return _jitted(config)(params, *args, **kwargs)


def test_shapes_and_the_text_behind_the_queries(params):
    ids = np.array([[3, 4, 5]] * 2)
    out = _apply(params, _context(), ids)
    assert out.tokens.shape == (2, 5, 32)
    assert out.hidden.shape == (2, 8, 16)
    assert _apply(params, _context()).hidden.shape == (2, 5, 16)


def test_padding_on_the_right_changes_nothing(params):
    ids = np.array([[3, 4, 5]] * 2)
    alone = _apply(params, _context(), ids).tokens  # the shapes of the test above
    padded = np.array([[3, 4, 5, 9, 9]] * 2)
    mask = np.array([[1, 1, 1, 0, 0]] * 2)
    np.testing.assert_allclose(_apply(params, _context(), padded, mask).tokens, alone, atol=1e-6)
    # Seen, the same ids do change it; and an empty text is not the same as none.
    assert np.abs(_apply(params, _context(), padded).tokens - alone).max() > 1e-4
    nothing = _apply(params, _context(), padded, np.zeros_like(mask)).tokens
    np.testing.assert_allclose(nothing, _apply(params, _context()).tokens, atol=1e-6)


def test_hidden_context_is_not_read(params):
    context = _context()
    mask = np.array([[1, 1, 1, 1, 0, 0]] * 2)
    changed = context.copy()
    changed[:, 4:] += 7
    masked = _apply(params, context, context_mask=mask).tokens
    np.testing.assert_array_equal(_apply(params, changed, context_mask=mask).tokens, masked)
    assert np.abs(_apply(params, changed).tokens - masked).max() > 1e-4


def test_a_bridge_without_text_has_nothing_of_it():
    config = dataclasses.replace(TINY, text=False)
    tree = _init(config)["params"]
    paths = traverse_util.flatten_dict(tree, sep="/")
    assert not [path for path in paths if "/mlp/" in path or path.startswith("embeddings/word")]
    assert "embeddings/position" not in paths
    assert any("/mlp_query/" in path for path in paths)
    with pytest.raises(ConfigError, match="text=False"):
        _apply({"params": tree}, _context(), np.zeros((2, 3), int), config=config)


def test_extra_queries_start_drawn_or_at_zero():
    for zero in (False, True):
        config = dataclasses.replace(TINY, zero_extra_queries=zero)
        init = jax.jit(partial(Bridge(config).init, method="embed"), static_argnums=1)
        tree = meta.unbox(init(jax.random.key(0), 1))["params"]
        assert (np.abs(tree["extra_query_tokens"]).max() == 0) == zero
        assert 0.005 < tree["query_tokens"].std() < 0.05


def test_every_parameter_has_axis_names():
    boxed = jax.eval_shape(Bridge(WITH_TAIL).init, jax.random.key(0), _context())["params"]
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: hasattr(x, "names"))
    assert leaves
    for leaf in leaves:
        assert len(leaf.names) == leaf.value.ndim
    assert boxed["groups"]["layer_0"]["mlp"]["fc1"]["kernel"].names == ("layers", "embed", "mlp")
    assert boxed["tail"]["layer_0"]["mlp"]["fc1"]["kernel"].names == ("embed", "mlp")


def test_dropout_and_drop_path_only_in_training(params):
    # Another generator than the default one, whose code takes XLA long to compile.
    keys = jax.random.split(jax.random.key(1, impl="rbg"))
    rngs = {"dropout": keys[0], "droppath": keys[1]}
    quiet = _apply(params, _context()).tokens
    noisy = _apply(params, _context(), train=True, rngs=rngs).tokens
    assert np.abs(noisy - quiet).max() > 1e-3
    config = dataclasses.replace(
        TINY, dropout_rate=0.0, attention_dropout_rate=0.0, drop_path_rate=0.0
    )
    np.testing.assert_array_equal(
        _apply(params, _context(), config=config, train=True, rngs=rngs).tokens, quiet
    )


def test_drop_path_grows_over_the_layers():
    config = dataclasses.replace(TINY, drop_path_rate=0.8, depth=5)
    rates = [
        bridge_lib.drop_path_rates(config, group, size) for group, size in enumerate((2, 2, 1))
    ]
    np.testing.assert_allclose(np.concatenate(rates), [0, 0.2, 0.4, 0.6, 0.8], rtol=1e-6)


def test_remat_and_bfloat16(params):
    reference = _apply(params, _context()).tokens
    config = dataclasses.replace(TINY, remat="dots")
    np.testing.assert_allclose(
        _apply(params, _context(), config=config).tokens, reference, atol=1e-5
    )
    precision = dataclasses.replace(TINY.precision, compute_dtype="bfloat16")
    config = dataclasses.replace(TINY, precision=precision)
    out = _apply(params, _context(), config=config).tokens
    assert out.dtype == jnp.bfloat16
    assert np.abs(out - reference).max() < 0.05 * np.abs(reference).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_queries": 0}, "num_queries=0"),
        ({"num_extra_queries": -1}, "num_extra_queries=-1"),
        ({"cross_every": 0}, "cross_every=0"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"remat": "some"}, "remat='some'"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **change)


def test_misfits_are_refused(params):
    with pytest.raises(ConfigError, match="context_width=24"):
        _apply(params, np.zeros((1, 4, 25), np.float32))
    with pytest.raises(ConfigError, match="max_length=8"):
        _apply(params, _context(), np.zeros((2, 9), int))
    assert BridgeConfig().num_tokens == 96


def test_kernels_of_layers_start_with_the_deviation_that_is_asked_for():
    config = dataclasses.replace(TINY, text=False, init_std=0.25)
    params = meta.unbox(jax.jit(Bridge(config).init)(jax.random.key(0), _context())["params"])
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in (p for p in flat if p.endswith("/kernel")):
        wanted = 0.02 if path.startswith("project_") else 0.25
        assert float(jnp.std(flat[path])) == pytest.approx(wanted, rel=0.2), path
    with pytest.raises(ConfigError, match="init_std"):
        dataclasses.replace(TINY, init_std=0.0)
