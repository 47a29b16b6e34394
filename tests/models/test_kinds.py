"""Every kind of model: its parameters name axes that the sharding table knows; it runs in bf16."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from iv2_jax.models import kinds, zoo
from iv2_jax.models.layers import Precision
from iv2_jax.parallel.rules import RULES, path_name


@pytest.mark.parametrize("name", [n for n in zoo.names() if n.startswith("test_")])
def test_every_parameter_names_its_axes(name):
    config = zoo.get(name)
    boxed = kinds.of(config).boxed_params(config)
    is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
    assert leaves
    for path, leaf in leaves:
        where = path_name(path)
        if not is_box(leaf):
            assert leaf.ndim == 0, f"{where} {leaf.shape} names no axes"
            continue
        assert len(leaf.names) == leaf.value.ndim, where
        assert {axis for axis in leaf.names if axis} <= RULES.keys(), (where, leaf.names)


def _in_bfloat16(config):
    """The config with every compute dtype in it bfloat16."""
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Precision):
            changes[field.name] = dataclasses.replace(value, compute_dtype="bfloat16")
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _in_bfloat16(value)
    return dataclasses.replace(config, **changes)


def _example(spec, seed=0):
    """Ones for a text's ids, normal draws for anything continuous; static values as they are."""
    if not isinstance(spec, jax.ShapeDtypeStruct):
        return spec
    if jnp.issubdtype(spec.dtype, jnp.floating):
        return jax.random.normal(jax.random.key(seed), spec.shape, spec.dtype)
    return jnp.ones(spec.shape, spec.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in zoo.names() if n.startswith("test_")])
def test_bfloat16_stays_near_float32(name):
    config = zoo.get(name)
    low = _in_bfloat16(config)
    assert low != config
    kind = kinds.of(config)
    inputs = {key: jax.tree.map(_example, spec) for key, spec in kind.inputs(config).items()}
    arrays = {key: value for key, value in inputs.items() if isinstance(value, jax.Array)}
    static = {key: value for key, value in inputs.items() if key not in arrays}
    init = jax.jit(functools.partial(kind.build(config).init, **static))
    params = {"params": meta.unbox(init(jax.random.key(0), **arrays))["params"]}

    def run(config):
        apply = jax.jit(functools.partial(kind.build(config).apply, **static))
        return jax.tree.leaves(apply(params, **arrays))

    for full, rounded in zip(run(config), run(low), strict=True):
        if jnp.issubdtype(full.dtype, jnp.floating) and full.size:
            error = jnp.abs(full.astype(jnp.float32) - rounded.astype(jnp.float32)).max()
            assert float(error) < 3e-2 * float(jnp.abs(full).max()), name
