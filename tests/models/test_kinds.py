"""Every kind of model: each parameter names its axes, and the sharding table knows the names."""

from __future__ import annotations

import jax
import pytest
from flax.core import meta

from iv2_jax.models import kinds, zoo
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
