"""What the text towers of the CLIP models have in common: their output and their embedding."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TextOutput:
    """What a text tower gives.

    Attributes:
        tokens: `(B, N, D)` after the last block and the final norm.
        pooled: `(B, C)` the projected feature of the pooled token; it has no unit length.
        features: `(K, B, N, D)` residual stream after each asked-for block, ascending, or None.
    """

    tokens: jax.Array
    pooled: jax.Array
    features: jax.Array | None = None


def embed_ids(table: jax.Array, ids: jax.Array, dtype: str) -> jax.Array:
    """Rows of a vocabulary's table.

    Args:
        table: `(V, D)`.
        ids: int `(B, N)`.
        dtype: of the result.

    Returns:
        `(B, N, D)`; an id outside the vocabulary gives NaN, never another token.
    """
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan).astype(dtype)


def pick_token(tokens: jax.Array, index: jax.Array) -> jax.Array:
    """Takes one token of each text: `(B, N, D)` and int `(B,)` give `(B, D)`."""
    return jnp.take_along_axis(tokens, index[:, None, None], axis=1)[:, 0]
