"""A tiny model of every family with random weights, shared by the tests of this folder."""

from __future__ import annotations

import jax
import numpy as np
from flax import traverse_util

from iv2_jax.interop import entries, families
from iv2_jax.models import zoo


def tiny_names():
    """The zoo's tiny models."""
    return [name for name in zoo.names() if name.startswith("test_")]


def exported_names():
    """Those of them that can be exported."""
    return [n for n in tiny_names() if families.get(zoo.family(n)).torch_file is not None]


def random_params(config, seed=0, dtype=np.float32):
    """Parameters of the size of trained ones; those that must be positive are."""
    rng = np.random.default_rng(seed)
    flat = traverse_util.flatten_dict(
        entries.abstract_params(families.of(config).entries(config)), sep="/"
    )
    made = {}
    for path, leaf in flat.items():
        value = rng.normal(size=leaf.shape) * 0.2
        if path.rsplit("/")[-1] in ("var", "temp", "weight_g"):
            value = np.abs(value) + 0.5
        if path.rsplit("/")[-1] == "count":  # of batches: PyTorch keeps a whole number
            value = np.full(leaf.shape, 7.0)
        made[path] = np.asarray(value, dtype)
    return traverse_util.unflatten_dict(made, sep="/")


def random_tree(entries_, seed=0, dtype=np.float32):
    """Parameters of a key table whose values are all different."""
    rng = np.random.default_rng(seed)
    abstract = entries.abstract_params(entries_)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), abstract)


def check_round_trip(params, entries_):
    """Asserts that ours -> PyTorch -> ours -> PyTorch changes nothing, keys and shapes included."""
    tensors = entries.to_torch(params, entries_)
    assert {k: v.shape for k, v in tensors.items()} == entries.torch_shapes(entries_)
    back = entries.from_torch(tensors, entries_)
    jax.tree.map(np.testing.assert_array_equal, params, back)
    again = entries.to_torch(back, entries_)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor)


def equal(tree, other):
    """Asserts that two trees are the same to the bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert one.dtype == two.dtype
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()
