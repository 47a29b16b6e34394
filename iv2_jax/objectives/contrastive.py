"""Contrastive losses of pooled features, with soft targets for repeated ids (spec stage2 6.1).

The loss is of the global batch, however many devices hold it. `contrastive_loss` has three forms
that give the same numbers and differ in memory and traffic (docs/numerics.md has figures):

- `dense` writes the scores of all pairs and leaves their distribution to the partitioner; the
  least code, right at the original's batch of 4096. It also serves a `shard_map` over the data
  axis: there a shard compares its own rows with gathered columns (`all_a`, `all_b`, `all_ids`).
- `chunked` gathers some columns of every device at a time.
- `ring` passes the columns from device to device, so that no device holds more than two parts of
  the batch (`contrastive_sharded`).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models.layers import unit_length
from iv2_jax.objectives.contrastive_sharded import sharded_contrastive_loss

Form = Literal["dense", "chunked", "ring"]
Kind = Literal["softmax", "sigmoid"]

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # stage 2's range


def clamp_temperature(
    temperature: jax.Array,
    low: float = MIN_TEMPERATURE,
    high: float | None = MAX_TEMPERATURE,
) -> jax.Array:
    """The learned temperature, brought into its range.

    The original clamps the parameter itself before every forward pass, so the gradient flows
    through as if nothing had been clamped; so it does here. The parameter is not changed: a
    training step that wants the original's to the letter stores the clamped value too.

    Args:
        temperature: scalar parameter.
        low: least value; 0.001 in stage 2, 0.01 in CLIP.
        high: greatest value, None for none (CLIP).

    Returns:
        float32 scalar, whose gradient is that of `temperature`.
    """
    value = temperature.astype(jnp.float32)
    # The difference is an exact zero, so that the result is exactly the bound.
    return jax.lax.stop_gradient(jnp.clip(value, low, high)) + (
        value - jax.lax.stop_gradient(value)
    )


def scale_gradient(features: jax.Array, factor: float) -> jax.Array:
    """`features` as they are, with their gradient multiplied by `factor`.

    The original's all-gather passes back only the local slice of the gradient, without a sum over
    devices, and gradients are then averaged: the encoders' contrastive gradient is 1/W of the true
    one on W devices, while the temperature's is exact. One global program reproduces that with
    `factor = 1 / W` of the original's device count (64 for 1B, 256 for 6B); 1 gives the true
    gradient.

    Args:
        features: any shape.
        factor: what the gradient is multiplied by.

    Returns:
        The same shape and values.
    """
    if factor == 1.0:
        return features
    fixed = jax.lax.stop_gradient(features)
    return fixed + factor * (features - fixed)  # the difference is an exact zero


def similarity(
    a: jax.Array, b: jax.Array, temperature: jax.Array | float = 1.0, frames: str = "mean"
) -> jax.Array:
    """Cosine similarities over the temperature.

    Args:
        a: `(M, C)` features, or `(M, L, C)` with one for each of L frames.
        b: `(N, C)` or `(N, L, C)`, likewise; at most one of both has frames.
        temperature: what the cosines are divided by.
        frames: 'mean' or 'max' of a clip's similarities over its frames.

    Returns:
        `(M, N)` float32.

    Raises:
        ValueError: `frames` is neither, or both inputs have frames.
    """
    if frames not in ("mean", "max"):
        raise ValueError(f"frames={frames!r}: choose 'mean' or 'max'")
    if a.ndim == b.ndim == 3:
        raise ValueError(f"only one side may have frames, got shapes {a.shape} and {b.shape}")
    a, b = (unit_length(x.astype(jnp.float32)) for x in (a, b))
    if frames == "mean":  # of products with one vector is the product with the mean
        a, b = (x.mean(axis=1) if x.ndim == 3 else x for x in (a, b))
    if a.ndim == 3:
        scores = jnp.einsum("mlc,nc->mnl", a, b)
    elif b.ndim == 3:
        scores = jnp.einsum("mc,nlc->mnl", a, b)
    else:
        return a @ b.T / temperature
    return scores.max(axis=-1) / temperature


def soft_targets(ids: jax.Array, other_ids: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Shares of each row that its columns of equal id have.

    Args:
        ids: int `(M,)` ids of the rows, such as a clip's place in its data set.
        other_ids: int `(N,)` ids of the columns; every row's id is among them.
        valid: bool `(N,)` columns that count, None for all.

    Returns:
        `(M, N)` float32, rows summing to one; zeros in a row whose id no column that counts has.
    """
    equal = ids[:, None] == other_ids[None, :]
    if valid is not None:
        equal &= valid[None, :]
    equal = equal.astype(jnp.float32)
    return equal / jnp.maximum(jnp.sum(equal, axis=1, keepdims=True), 1.0)


def soft_cross_entropy(
    scores: jax.Array, targets: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
    """Mean over rows of the cross entropy of scores with target shares.

    Args:
        scores: `(M, N)`.
        targets: `(M, N)` shares.
        valid: bool `(M,)` rows that count, None for all.

    Returns:
        float32 scalar, 0 where no row counts.
    """
    log_shares = jax.nn.log_softmax(scores.astype(jnp.float32), axis=1)
    return -_row_mean(jnp.sum(targets * log_shares, axis=1), valid)


def _row_mean(values: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Mean of `(M,)` over the rows that count."""
    if valid is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


def contrastive_loss(
    a: jax.Array,
    b: jax.Array,
    temperature: jax.Array,
    ids: jax.Array,
    *,
    valid: jax.Array | None = None,
    form: Form = "dense",
    kind: Kind = "softmax",
    bias: jax.Array | None = None,
    frames: str = "mean",
    chunk_size: int = 0,
    all_a: jax.Array | None = None,
    all_b: jax.Array | None = None,
    all_ids: jax.Array | None = None,
) -> jax.Array:
    """Contrastive loss of paired features; pairs of one id are positives of each other.

    `softmax` is the loss of the paper: cross entropy of each row with all columns and of each
    column with all rows, positives sharing the target equally. `sigmoid` is that of SigLIP (Zhai
    et al., 2023, arXiv 2303.15343): every pair of the batch is judged alone,
    `-log sigmoid(z * (cosine / temperature + bias))` with z = 1 for positives and -1 for others,
    summed over all pairs and divided by the number of rows. SigLIP starts at a temperature of 0.1
    and a bias of -10; neither is clamped there.

    Args:
        a: `(M, C)` features of one kind, before unit length; `(M, L, C)` with frames.
        b: `(M, C)` features of the other kind, row i belonging to row i of `a`.
        temperature: scalar, already clamped.
        ids: int `(M,)`.
        valid: bool `(M,)`, pairs that count; the others are neither rows nor columns, whatever
            their features hold, and get no gradient. None for all.
        form: `dense`, `chunked` or `ring`; same values and gradients. The two last take global
            arrays under the mesh of `jax.set_mesh` or `use_abstract_mesh` and split the rows over
            its axes data and fsdp; without a mesh they compute on one device.
        kind: `softmax` or `sigmoid`.
        bias: scalar parameter of the sigmoid.
        frames: see `similarity`; features with frames need the dense form.
        chunk_size: columns compared at a time in the forms other than dense; 0 for as many as
            make a block of scores of 8 MiB, 4096 at most.
        all_a: `(N, C)` features to compare `b` with; None for `a` itself. In a `shard_map`, `a` of
            all shards; so are `all_b` and `all_ids`. Dense form without `valid` only.
        all_b: `(N, C)` features to compare `a` with; None for `b` itself.
        all_ids: int `(N,)`; None for `ids` itself.

    Returns:
        float32 scalar: the mean over the rows that count, 0 when there is none. For `softmax` that
        of both directions' cross entropies, halved. In a `shard_map` the mean over equal shards is
        the loss of all rows.

    Raises:
        ConfigError: an unknown form or kind, a form that cannot do what is asked, a sigmoid
            without bias or a softmax with one, or rows that do not divide over the mesh.
    """
    gathered = any(x is not None for x in (all_a, all_b, all_ids))
    _check(form, kind, bias, with_frames=a.ndim == 3 or b.ndim == 3, gathered=gathered)
    if gathered and valid is not None:
        raise ConfigError("valid= counts rows of the whole batch: leave all_a, all_b, all_ids out")
    if valid is not None:  # what is not finite in them would reach others as 0 * inf
        a, b = (jnp.where(valid.reshape(-1, *(1,) * (x.ndim - 1)), x, 0) for x in (a, b))
    if form != "dense":
        return sharded_contrastive_loss(
            a,
            b,
            temperature,
            0.0 if bias is None else bias,
            ids,
            jnp.ones(ids.shape, bool) if valid is None else valid,
            ring=form == "ring",
            sigmoid=kind == "sigmoid",
            chunk_size=chunk_size,
        )
    all_a, all_b = a if all_a is None else all_a, b if all_b is None else all_b
    all_ids = ids if all_ids is None else all_ids
    if kind == "sigmoid":
        scores = similarity(a, all_b, temperature, frames) + bias
        signs = jnp.where(ids[:, None] == all_ids[None, :], 1.0, -1.0)
        losses = jax.nn.softplus(-signs * scores)
        if valid is not None:
            losses = jnp.where(valid[None, :], losses, 0.0)
        return _row_mean(jnp.sum(losses, axis=1), valid)
    targets = soft_targets(ids, all_ids, valid)
    directions = []
    for rows, columns in ((a, all_b), (b, all_a)):
        scores = similarity(rows, columns, temperature, frames)
        if valid is not None:
            # Finite, so that a target of zero times it is zero.
            scores = jnp.where(valid[None, :], scores, -1e30)
        directions.append(soft_cross_entropy(scores, targets, valid))
    return (directions[0] + directions[1]) / 2


def _check(form: str, kind: str, bias: object, *, with_frames: bool, gathered: bool) -> None:
    """Refuses settings of `contrastive_loss` that contradict each other."""
    for name, value, known in (
        ("form", form, ("dense", "chunked", "ring")),
        ("kind", kind, ("softmax", "sigmoid")),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is unknown{nearest(str(value), known)}")
    if kind == "sigmoid" and bias is None:
        raise ConfigError("kind='sigmoid' needs bias=, a learned scalar (-10 at the start)")
    if kind == "softmax" and bias is not None:
        raise ConfigError("bias= belongs to kind='sigmoid'; a softmax would not see it")
    if form != "dense" and with_frames:
        raise ConfigError(
            f"form={form!r} takes one feature for each row: pool the frames, or use form='dense'"
        )
    if form != "dense" and gathered:
        raise ConfigError(f"form={form!r} gathers by itself: leave all_a, all_b and all_ids out")
