from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import kinds, zoo
from iv2_jax.models.text.mobileclip import MobileClipConfig, MobileClipText

TINY = MobileClipConfig(
    vocab_size=40,
    context_length=9,
    width=16,
    mlp_widths=(24, 24, 32),
    num_heads=(2, 2, 4),
    out_width=12,
)
IDS = np.array([[5, 7, 11, 39, 0, 0, 0, 0, 0], [3, 2, 39, 8, 39, 0, 0, 0, 0]])


@pytest.fixture(scope="module")
def params():
    """Random parameters far from where they start, so that every one of them matters."""
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(
            rng.normal(path[-1].key == "scale", 0.3, leaf.shape), np.float32
        ),
        zoo.abstract_params(TINY),
    )


def _run(params, ids=IDS, config=TINY, **kwargs):
    run = jax.jit(lambda p, i: MobileClipText(config).apply({"params": p}, i, **kwargs))
    return run(params, jnp.asarray(ids))


def test_named_size_has_the_originals_count():
    assert zoo.count_params(MobileClipConfig()) == 63_428_096


def test_equal_blocks_are_one_stack_and_others_are_runs():
    assert MobileClipConfig().stacks == (("blocks", 0, 12),)
    assert TINY.stacks == (("blocks_0", 0, 2), ("blocks_1", 2, 1))


def test_later_tokens_do_not_change_earlier_ones(params):
    changed = IDS.copy()
    changed[:, 4:] = 20
    np.testing.assert_array_equal(_run(params).tokens[:, :4], _run(params, changed).tokens[:, :4])


def test_bidirectional_tokens_see_the_padding(params):
    config = dataclasses.replace(TINY, causal=False)
    changed = IDS.copy()
    changed[:, -1] = 1
    difference = _run(params, config=config).pooled - _run(params, changed, config).pooled
    assert jnp.abs(difference).min() > 1e-6


def test_the_first_of_the_largest_ids_is_pooled(params):
    out = _run(params)
    picked = out.tokens[jnp.arange(2), jnp.array([3, 2])]
    expected = picked @ params["proj"]["kernel"]
    np.testing.assert_allclose(out.pooled, expected, rtol=1e-5, atol=1e-5)


def test_features_are_those_of_the_asked_blocks_across_stacks(params):
    every = _run(params, return_layers=(0, 1, 2)).features
    some = _run(params, return_layers=(1, -1)).features
    np.testing.assert_array_equal(some, every[1:])
    assert _run(params).features is None


def test_shorter_texts_use_resized_positions(params):
    same = dict(params, pos_embed=jnp.broadcast_to(params["pos_embed"][:, :, :1], (1, 1, 9, 16)))
    # With equal positions everywhere resizing changes nothing, so causality gives the prefix.
    np.testing.assert_allclose(
        _run(same, IDS[:, :5]).tokens, _run(same).tokens[:, :5], rtol=1e-4, atol=1e-5
    )
    cut = dict(params, pos_embed=params["pos_embed"][:, :, :5])
    config = dataclasses.replace(TINY, context_length=5)
    resized, plain = _run(params, IDS[:, :5]).tokens, _run(cut, IDS[:, :5], config).tokens
    assert jnp.abs(resized - plain).max() > 1e-2


def test_an_unknown_id_gives_nan(params):
    assert jnp.isnan(_run(params, np.full((1, 9), 40)).pooled).all()


def test_every_parameter_has_axis_names():
    params = kinds.of(TINY).boxed_params(TINY)
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)):
        assert isinstance(leaf, meta.AxisMetadata)
        assert len(leaf.names) == leaf.value.ndim


def test_rematerialisation_changes_no_gradient(params):
    config = dataclasses.replace(TINY, mlp_widths=(24, 24), num_heads=(2, 2))
    two = {"blocks" if name == "blocks_0" else name: value for name, value in params.items()}
    del two["blocks_1"]

    def loss(params, config):
        return jnp.sum(MobileClipText(config).apply({"params": params}, IDS).pooled ** 2)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        grad(two, config),
        grad(two, dataclasses.replace(config, remat="full")),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width=0"),
        ({"mlp_widths": ()}, "mlp_widths"),
        ({"num_heads": (2, 2)}, "names 2 blocks"),
        ({"num_heads": (2, 3, 4)}, "not a multiple of 3"),
        ({"remat": "all"}, "remat='all'"),
    ],
)
def test_bad_configs_name_the_field(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **change)
