"""The key-value cache of a decoder: arrays of a fixed size, so that one step compiles once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

if TYPE_CHECKING:
    from iv2_jax.models.llm_layers import DecoderConfig


@struct.dataclass
class KVCache:
    """Keys and values of the tokens a decoder has seen, in arrays of a fixed size.

    Attributes:
        keys: `(layers, B, slots, kv_heads, head_dim)`, rotated.
        values: the same shape.
        positions: int32 `(B, slots)` position of the token in a slot; -1 where a slot is empty or
            holds padding, and is never attended to.
        length: int32 scalar, slots filled so far, the same for all rows.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    length: jax.Array

    @property
    def next_position(self) -> jax.Array:
        """Position `(B,)` of the token that comes next in each row."""
        return jnp.max(self.positions, axis=1, initial=-1) + 1


def empty_cache(config: DecoderConfig, batch: int, slots: int) -> KVCache:
    """Makes a cache with room for `slots` tokens a row, in the compute dtype."""
    shape = (config.depth, batch, slots, config.num_kv_heads, config.head_dim)
    dtype = jnp.dtype(config.precision.compute_dtype)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def positions_of(mask: jax.Array) -> jax.Array:
    """Positions `(B, N)` that count the real tokens of each row; padding before them gets 0."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)
