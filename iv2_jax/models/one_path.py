"""Greedy decoding and sampling: the loop's state and steps, shared by `generate` and `streaming`.

One path a row: each step runs the last token of every row and appends the next. A row's draws
depend on its own key and on how many tokens it has, and on nothing else in the batch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from iv2_jax.errors import ConfigError
from iv2_jax.models.decoding import (
    GenerationConfig,
    decode_step,
    edit_scores,
    has_ended,
    mark_seen,
    sampling_logits,
)
from iv2_jax.models.kv_cache import KVCache
from iv2_jax.models.llm import Llm


@struct.dataclass
class PathState:
    """Loop state: `count` tokens of each row are set.

    Attributes:
        count: int32 scalar.
        tokens: int32 `(B, max_new_tokens)`; `pad_id` behind a row's end.
        lengths: int32 `(B,)` tokens of each row.
        scores: float32 `(B,)` log-probability of each row.
        ended: bool `(B,)`.
        cache: keys and values of all tokens but the last.
        seen: bool `(B, V)` tokens in the row, or None without a repetition penalty.
        keys: `(B,)` keys of the draws, or None without sampling.
    """

    count: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    ended: jax.Array
    cache: KVCache
    seen: jax.Array | None
    keys: jax.Array | None


def row_keys(rng: jax.Array | None, batch: int) -> jax.Array | None:
    """Gives one key a row: row i of a single key is `fold_in(rng, i)`; None stays.

    Args:
        rng: one key, or `(B,)` keys, with which a row draws the same in whatever batch it stands.
        batch: number of rows B.

    Raises:
        ConfigError: there are several keys, but not one for each row.
    """
    if rng is None:
        return None
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):  # of jax.random.PRNGKey
        rng = jax.random.wrap_key_data(rng)
    if rng.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(batch))
    if rng.shape != (batch,):
        raise ConfigError(f"rng has shape {rng.shape}: give one key, or one for each of {batch}")
    return rng


def start(
    config: GenerationConfig,
    logits: jax.Array,
    cache: KVCache,
    seen: jax.Array | None,
    keys: jax.Array | None,
) -> PathState:
    """Makes the state with each row's first token, from the prompt's last logits `(B, V)`."""
    batch = logits.shape[0]
    state = PathState(
        count=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, config.max_new_tokens), config.pad_id, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        scores=jnp.zeros(batch, jnp.float32),
        ended=jnp.zeros(batch, bool),
        cache=cache,
        seen=seen,
        keys=keys,
    )
    return _choose(logits, state, config)


def advance(
    model: Llm, params: Any, config: GenerationConfig, state: PathState, until: jax.Array | int
) -> PathState:
    """Appends tokens until there are `until` of them, or all rows have ended."""

    def body(state: PathState) -> PathState:
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=1, keepdims=False)
        logits, cache = decode_step(model, params, last, state.cache)
        return _choose(logits, state.replace(cache=cache), config)

    return jax.lax.while_loop(
        lambda state: (state.count < until) & ~jnp.all(state.ended), body, state
    )


def _choose(logits: jax.Array, state: PathState, config: GenerationConfig) -> PathState:
    """Appends one token to every row that has not ended."""
    edited = edit_scores(logits, state.seen, state.count, config)
    if config.do_sample:
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
        token = jax.vmap(jax.random.categorical)(keys, sampling_logits(edited, config))
    else:
        token = jnp.argmax(edited, axis=-1)
    # Not log_softmax: that would make a whole row of the vocabulary for one number of it.
    score = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    score = score - jax.nn.logsumexp(logits, axis=-1)
    token = jnp.where(state.ended, config.pad_id, token).astype(jnp.int32)
    tokens = jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.count, axis=1)
    count = state.count + 1
    return state.replace(
        count=count,
        tokens=tokens,
        lengths=jnp.where(state.ended, state.lengths, count),
        scores=state.scores + jnp.where(state.ended, 0.0, score),
        ended=state.ended | has_ended(tokens, count, config),
        seen=mark_seen(state.seen, token),
    )
