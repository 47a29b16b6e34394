"""Feature-alignment losses of stage 1 and of distillation (spec stage1 3.3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def alignment_loss(
    student: jax.Array, target: jax.Array, weight: jax.Array | None = None
) -> jax.Array:
    """Mean over layers, clips and tokens jointly of `2 - 2 <student, target>`.

    For unit vectors this is their squared distance. The class token, where there is one, counts
    as any other token.

    Args:
        student: `(K, B, N, C)` unit vectors.
        target: `(K, B, N, C)` unit vectors.
        weight: `(B, N)` non-negative weights of tokens, the same for every layer, or None for
            equal ones. Weights that are all zero give a loss of zero.

    Returns:
        float32 scalar.
    """
    distance = _squared_distance(student, target)
    if weight is None:
        return jnp.mean(distance)
    weight = weight.astype(jnp.float32)
    total = jnp.sum(weight) * distance.shape[0]
    return jnp.sum(distance * weight) / jnp.where(total > 0, total, 1.0)


def final_loss(student: jax.Array, target: jax.Array) -> jax.Array:
    """Mean over clips of `2 - 2 <student, target>` of pooled features.

    Args:
        student: `(B, C)` unit vectors.
        target: `(B, C)` unit vectors.

    Returns:
        float32 scalar.
    """
    return jnp.mean(_squared_distance(student, target))


def gather_targets(target: jax.Array, visible: jax.Array, *, has_cls: bool) -> jax.Array:
    """Picks the teacher's tokens that the student saw.

    Args:
        target: `(K, B, N, C)` all tokens of the teacher, on the student's grid.
        visible: int `(B, M)` token numbers of the student, class token (0) first.
        has_cls: the teacher's first token is a class token. If not, tokens of the teacher are
            numbered from the student's token 1 on, and the student's class token has no target.

    Returns:
        `(K, B, M, C)` with, `(K, B, M - 1, C)` without class token; NaN where a number of
        `visible` is out of range.
    """
    index = visible if has_cls else visible[:, 1:] - 1
    return jnp.take_along_axis(target, index[None, :, :, None], axis=2)


def _squared_distance(student: jax.Array, target: jax.Array) -> jax.Array:
    """`2 - 2 <u, v>` over the last axis, in float32."""
    dot = jnp.sum(student.astype(jnp.float32) * target.astype(jnp.float32), axis=-1)
    return 2.0 - 2.0 * dot
