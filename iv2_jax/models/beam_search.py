"""Beam search in one compiled loop, with the ranking and stopping rules of `transformers`.

`num_beams` running beams of each row are extended by every token; the best continuations go on,
those that end are moved to a second list of the same size, ranked by log-probability / length **
length_penalty. All beams of a row share the prompt's part of the cache, so only the part behind it
is reordered.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from iv2_jax.errors import ConfigError
from iv2_jax.models.decoding import (
    Generated,
    GenerationConfig,
    decode_step,
    edit_scores,
    has_ended,
    mark_seen,
)
from iv2_jax.models.kv_cache import KVCache
from iv2_jax.models.llm import Llm

# Score of beams that must not be chosen; finite, so that ranks among them stay defined.
_HOPELESS = -1e9


@struct.dataclass
class _State:
    """Loop state. R = rows, K = beams; `count` tokens of every running beam are set."""

    count: jax.Array
    tokens: jax.Array  # (R, K, T) running beams, best first
    scores: jax.Array  # (R, K) their log-probabilities
    parents: jax.Array  # (R, K) which beam of the step before each one extends
    done_tokens: jax.Array  # (R, K, T) ended beams, best first
    done_scores: jax.Array  # (R, K) ranked scores
    done_lengths: jax.Array  # (R, K)
    done: jax.Array  # (R, K) whether the place is taken
    improvable: jax.Array  # (R,) a running beam may still overtake an ended one
    stuck: jax.Array  # no continuation goes on
    cache: KVCache  # of R * K rows
    seen: jax.Array | None  # (R * K, V)


def beam_search(
    model: Llm,
    params: Any,
    config: GenerationConfig,
    logits: jax.Array,
    cache: KVCache,
    seen: jax.Array | None,
    *,
    prompt_length: int,
) -> Generated:
    """Searches from the prompt's last logits on; traced by `generate`.

    Args:
        model: the language model.
        params: its parameters.
        config: the settings.
        logits: `(R, V)` after the prompt.
        cache: of the prompt, R rows.
        seen: bool `(R, V)` tokens of the prompt, or None without a repetition penalty.
        prompt_length: slots of the cache that the prompt fills.

    Returns:
        The best beam of every row.

    Raises:
        ConfigError: the vocabulary is smaller than the number of ending tokens plus one.
    """
    rows, vocab_size = logits.shape
    beams = config.num_beams
    endings = len(config.eos_ids) + len(config.stop_sequences)
    kept = max(2, 1 + endings)
    if kept > vocab_size:
        raise ConfigError(f"{endings} endings leave a vocabulary of {vocab_size} nothing to go on")

    def advance(logits: jax.Array, state: _State) -> _State:
        return _advance(logits, state, config, kept * beams)

    def body(state: _State) -> _State:
        flat = (jnp.arange(rows)[:, None] * beams + state.parents).reshape(-1)
        cache = _reordered(state.cache, flat, prompt_length)
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=2, keepdims=False)
        last = last.reshape(-1)
        seen = None if state.seen is None else mark_seen(state.seen[flat], last)
        logits, cache = decode_step(model, params, last, cache)
        return advance(logits, state.replace(cache=cache, seen=seen))

    blank = jnp.full((rows, beams, config.max_new_tokens), config.pad_id, jnp.int32)
    hopeless = jnp.full((rows, beams), _HOPELESS, jnp.float32)
    start = _State(
        count=jnp.zeros((), jnp.int32),
        tokens=blank,
        scores=hopeless.at[:, 0].set(0.0),  # all beams are one at the start
        parents=jnp.zeros((rows, beams), jnp.int32),
        done_tokens=blank,
        done_scores=hopeless,
        done_lengths=jnp.zeros((rows, beams), jnp.int32),
        done=jnp.zeros((rows, beams), bool),
        improvable=jnp.ones(rows, bool),
        stuck=jnp.zeros((), bool),
        cache=KVCache(
            keys=jnp.repeat(cache.keys, beams, axis=1),
            values=jnp.repeat(cache.values, beams, axis=1),
            positions=jnp.repeat(cache.positions, beams, axis=0),
            length=cache.length,
        ),
        seen=None if seen is None else jnp.repeat(seen, beams, axis=0),
    )

    def goes_on(state: _State) -> jax.Array:
        finished = jnp.all(state.done) & config.early_stopping
        return jnp.any(state.improvable) & ~finished & ~state.stuck

    state = advance(jnp.repeat(logits, beams, axis=0), start)
    state = jax.lax.while_loop(goes_on, body, state)
    return Generated(state.done_tokens[:, 0], state.done_lengths[:, 0], state.done_scores[:, 0])


def _advance(logits: jax.Array, state: _State, config: GenerationConfig, kept: int) -> _State:
    """Extends the running beams by one token; `kept` continuations of a row are looked at."""
    rows, beams, _ = state.tokens.shape
    vocab_size = logits.shape[-1]
    scores = edit_scores(jax.nn.log_softmax(logits), state.seen, state.count, config)
    scores = scores.reshape(rows, beams, vocab_size) + state.scores[:, :, None]
    scores, index = jax.lax.top_k(scores.reshape(rows, -1), kept)
    parents, token = index // vocab_size, (index % vocab_size).astype(jnp.int32)
    tokens = _pick(state.tokens, parents)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, state.count, axis=2)
    count = state.count + 1
    ended = has_ended(tokens, count, config) | (count == config.max_new_tokens)

    running, best = jax.lax.top_k(scores + ended * _HOPELESS, beams)
    state = _with_ended(state, tokens, scores, ended, count, config)
    # The best running beam against the worst place in the list, at today's length.
    hope = running[:, :1] / count.astype(jnp.float32) ** config.length_penalty
    worst = jnp.where(state.done, jnp.min(state.done_scores, axis=1, keepdims=True), _HOPELESS)
    return state.replace(
        count=count,
        tokens=_pick(tokens, best),
        scores=running,
        parents=_pick(parents, best),
        improvable=state.improvable & jnp.any(hope > worst, axis=1),
        stuck=jnp.all(ended),
    )


def _with_ended(
    state: _State,
    tokens: jax.Array,
    scores: jax.Array,
    ended: jax.Array,
    count: jax.Array,
    config: GenerationConfig,
) -> _State:
    """Enters the continuations that ended among the row's best `num_beams` into the list."""
    beams = state.tokens.shape[1]
    new = ended & (jnp.arange(ended.shape[1]) < beams)
    closed = ~state.improvable
    if config.early_stopping:
        closed |= jnp.all(state.done, axis=1)
    ranked = scores / count.astype(jnp.float32) ** config.length_penalty
    ranked = ranked + closed[:, None] * _HOPELESS + ~new * _HOPELESS
    done_scores, best = jax.lax.top_k(jnp.concatenate([state.done_scores, ranked], axis=1), beams)
    lengths = jnp.broadcast_to(count, ended.shape)

    def merged(old: jax.Array, new: jax.Array) -> jax.Array:
        return _pick(jnp.concatenate([old, new], axis=1), best)

    return state.replace(
        done_tokens=merged(state.done_tokens, tokens),
        done_scores=done_scores,
        done_lengths=merged(state.done_lengths, lengths),
        done=merged(state.done, new),
    )


def _pick(array: jax.Array, index: jax.Array) -> jax.Array:
    """Takes beams by row: `(R, K, ...)` and int `(R, M)` give `(R, M, ...)`."""
    index = index.reshape(index.shape + (1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1)


def _reordered(cache: KVCache, index: jax.Array, prompt_length: int) -> KVCache:
    """The cache whose row i is row `index[i]` behind the prompt; positions are a row's own."""

    def reorder(whole: jax.Array) -> jax.Array:
        tail = whole[:, :, prompt_length:]
        return whole.at[:, :, prompt_length:].set(tail[:, index])

    return cache.replace(keys=reorder(cache.keys), values=reorder(cache.values))
