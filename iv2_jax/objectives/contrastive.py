"""Contrastive losses of pooled features, with soft targets for repeated ids (spec stage2 6.1).

Everything is written for local rows against all columns, so that the same functions serve one
program over the whole batch (rows = columns) and a `shard_map` over the data axis: there a shard
gathers features and ids, compares its own rows with all, and the mean over shards of
`contrastive_loss` is the loss of the global batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from iv2_jax.models.layers import unit_length

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
    if a.ndim == 3:
        scores = jnp.einsum("mlc,nc->mnl", a, b)
    elif b.ndim == 3:
        scores = jnp.einsum("mc,nlc->mnl", a, b)
    else:
        return a @ b.T / temperature
    return (scores.mean(axis=-1) if frames == "mean" else scores.max(axis=-1)) / temperature


def soft_targets(ids: jax.Array, other_ids: jax.Array) -> jax.Array:
    """Shares of each row that its columns of equal id have.

    Args:
        ids: int `(M,)` ids of the rows, such as a clip's place in its data set.
        other_ids: int `(N,)` ids of the columns; every row's id is among them.

    Returns:
        `(M, N)` float32, rows summing to one.
    """
    equal = (ids[:, None] == other_ids[None, :]).astype(jnp.float32)
    return equal / jnp.sum(equal, axis=1, keepdims=True)


def soft_cross_entropy(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over rows of the cross entropy of `(M, N)` scores with `(M, N)` target shares."""
    log_shares = jax.nn.log_softmax(scores.astype(jnp.float32), axis=1)
    return -jnp.mean(jnp.sum(targets * log_shares, axis=1))


def contrastive_loss(
    a: jax.Array,
    b: jax.Array,
    temperature: jax.Array,
    ids: jax.Array,
    *,
    all_a: jax.Array | None = None,
    all_b: jax.Array | None = None,
    all_ids: jax.Array | None = None,
    frames: str = "mean",
) -> jax.Array:
    """Symmetric contrastive loss of paired features.

    Pairs of one id are positives of each other, with equal shares.

    Args:
        a: `(M, C)` features of one kind, before unit length; `(M, L, C)` with frames.
        b: `(M, C)` features of the other kind, row i belonging to row i of `a`.
        temperature: scalar, already clamped.
        ids: int `(M,)`.
        all_a: `(N, C)` features to compare `b` with; None for `a` itself. In a `shard_map`, `a` of
            all shards; so are `all_b` and `all_ids`.
        all_b: `(N, C)` features to compare `a` with; None for `b` itself.
        all_ids: int `(N,)`; None for `ids` itself.
        frames: see `similarity`.

    Returns:
        float32 scalar: the mean over the M rows of both directions' cross entropies, halved. Its
        mean over equal shards is the loss of all rows.
    """
    all_a, all_b = a if all_a is None else all_a, b if all_b is None else all_b
    targets = soft_targets(ids, ids if all_ids is None else all_ids)
    forward = soft_cross_entropy(similarity(a, all_b, temperature, frames), targets)
    backward = soft_cross_entropy(similarity(b, all_a, temperature, frames), targets)
    return (forward + backward) / 2
