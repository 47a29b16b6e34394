"""Gradients of a batch, computed part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv2_jax.parallel.mesh import BATCH_AXES


def mean_over_parts(
    gradients: Callable[[Any, jax.Array], tuple[Any, Any]],
    batch: Any,
    rng: jax.Array,
    parts: int,
    params: Any,
    train_mask: Any,
    mesh: Mesh,
) -> tuple[Any, Any]:
    """Means over parts of what `gradients` gives; one part's activations are in memory at a time.

    Args:
        gradients: (part, key) to ((loss, metrics), gradients of all parameters).
        batch: arrays `(B, ...)`; part i has rows i, i + n, i + 2n, ..., so that rows stay on their
            devices.
        rng: key; each part draws with its own.
        parts: n.
        params: parameters, for shapes and dtypes.
        train_mask: tree of bools; no sums are kept for parameters that are not trained.
        mesh: the mesh.

    Returns:
        As `gradients`; gradients of parameters that are not trained are zero.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, sharding)

    def trained(tree: Any) -> Any:
        return jax.tree.map(lambda x, keep: x if keep else None, tree, train_mask)

    def one(sums: Any, part: tuple[Any, jax.Array]) -> tuple[Any, Any]:
        rows, number = part
        values, grads = gradients(rows, jax.random.fold_in(rng, number))
        return jax.tree.map(jnp.add, sums, trained(grads)), values

    start = trained(jax.tree.map(jnp.zeros_like, params))
    sums, values = jax.lax.scan(one, start, (jax.tree.map(split, batch), jnp.arange(parts)))
    grads = jax.tree.map(
        lambda total, p: jnp.zeros_like(p) if total is None else total / parts,
        sums,
        params,
        is_leaf=lambda x: x is None,
    )
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), values), grads
