"""Text generation: greedy, sampling and beam search, each in one compiled loop.

The prompt is run once into a static key-value cache; then one `lax.while_loop` takes a token of
every row at a time, until all rows have ended or `max_new_tokens` is reached (spec stage 3, 7).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from iv2_jax.errors import ConfigError
from iv2_jax.models.beam_search import beam_search
from iv2_jax.models.decoding import (
    Generated,
    GenerationConfig,
    decode_step,
    edit_scores,
    has_ended,
    mark_seen,
    prefill,
    sampling_logits,
    seen_in_prompt,
)
from iv2_jax.models.kv_cache import KVCache
from iv2_jax.models.llm import Llm

__all__ = ["Generated", "GenerationConfig", "generate"]


def generate(
    model: Llm,
    params: Any,
    config: GenerationConfig,
    *,
    tokens: jax.Array | None = None,
    embeddings: jax.Array | None = None,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
) -> Generated:
    """Continues a batch of prompts.

    Compiled once for each prompt shape and config: pad prompts to a few lengths (with `mask`) to
    keep the number of programs small. Rows do not influence each other.

    Args:
        model: the language model.
        params: its parameters, unboxed.
        config: how tokens are chosen.
        tokens: int `(B, N)` prompt, or None if `embeddings` are given.
        embeddings: `(B, N, width)` prompt, such as text with visual rows.
        mask: bool `(B, N)`, False = padding, left or right; None for none. A row must have at
            least one real token.
        rng: key for sampling; needed with `do_sample` alone.

    Returns:
        New tokens, their number and their score for each row.

    Raises:
        ConfigError: an end, stop or pad id is outside the vocabulary, or sampling has no `rng`.
        ValueError: both or neither of `tokens` and `embeddings` are given.
    """
    if (tokens is None) == (embeddings is None):
        raise ValueError("give either tokens or embeddings")
    _check(config, model.config.vocab_size, rng)
    if mask is not None:
        mask = jnp.asarray(mask).astype(bool)
    return _generate(model, config, params, tokens, embeddings, mask, rng)


def _check(config: GenerationConfig, vocab_size: int, rng: jax.Array | None) -> None:
    """Raises ConfigError where the settings do not fit the model."""
    ids = {"eos_ids": config.eos_ids, "pad_id": (config.pad_id,)}
    ids["stop_sequences"] = sum(config.stop_sequences, ())
    for field, values in ids.items():
        for value in values:
            if not 0 <= value < vocab_size:
                raise ConfigError(f"{field}: {value} is no id of a vocabulary of {vocab_size}")
    if config.do_sample and rng is None:
        raise ConfigError("do_sample=True needs rng=jax.random.key(...)")


@partial(jax.jit, static_argnames=("model", "config"))
def _generate(
    model: Llm,
    config: GenerationConfig,
    params: Any,
    tokens: jax.Array | None,
    embeddings: jax.Array | None,
    mask: jax.Array | None,
    rng: jax.Array | None,
) -> Generated:
    """Runs the prompt, then the loop the config asks for."""
    if embeddings is None:
        embeddings = model.apply({"params": params}, tokens, method="embed_tokens")
    batch, length, _ = embeddings.shape
    # The last token is given out, never run: it needs no slot.
    logits, cache = prefill(model, params, embeddings, mask, length + config.max_new_tokens - 1)
    seen = None
    if config.repetition_penalty != 1:
        seen = seen_in_prompt(tokens, mask, (batch, model.config.vocab_size))
    if config.num_beams > 1:
        return beam_search(model, params, config, logits, cache, seen, prompt_length=length)
    return _one_path(model, params, config, logits, cache, seen, rng)


@struct.dataclass
class _State:
    """Loop state: `count` tokens of each row are set."""

    count: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    ended: jax.Array
    cache: KVCache
    seen: jax.Array | None


def _one_path(
    model: Llm,
    params: Any,
    config: GenerationConfig,
    logits: jax.Array,
    cache: KVCache,
    seen: jax.Array | None,
    rng: jax.Array | None,
) -> Generated:
    """Greedy decoding or sampling, from the prompt's last logits on."""
    batch = logits.shape[0]

    def choose(logits: jax.Array, state: _State) -> _State:
        """Appends one token to every row that has not ended."""
        edited = edit_scores(logits, state.seen, state.count, config)
        if config.do_sample:
            key = jax.random.fold_in(rng, state.count)
            token = jax.random.categorical(key, sampling_logits(edited, config))
        else:
            token = jnp.argmax(edited, axis=-1)
        log_probs = jax.nn.log_softmax(logits)
        score = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
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

    def body(state: _State) -> _State:
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=1, keepdims=False)
        logits, cache = decode_step(model, params, last, state.cache)
        return choose(logits, state.replace(cache=cache))

    start = _State(
        count=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, config.max_new_tokens), config.pad_id, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        scores=jnp.zeros(batch, jnp.float32),
        ended=jnp.zeros(batch, bool),
        cache=cache,
        seen=seen,
    )
    state = jax.lax.while_loop(
        lambda state: (state.count < config.max_new_tokens) & ~jnp.all(state.ended),
        body,
        choose(logits, start),
    )
    return Generated(state.tokens, state.lengths, state.scores)
