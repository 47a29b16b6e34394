"""Text generation: greedy, sampling and beam search, each in one compiled loop.

The prompt is run once into a static key-value cache; then one `lax.while_loop` takes a token of
every row at a time, until all rows have ended or `max_new_tokens` is reached (spec stage 3, 7).
`streaming` gives the tokens out as they come.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.errors import ConfigError, DataError
from iv2_jax.models import one_path
from iv2_jax.models.beam_search import beam_search
from iv2_jax.models.decoding import Generated, GenerationConfig, prefill, seen_in_prompt
from iv2_jax.models.kv_cache import KVCache
from iv2_jax.models.llm import Llm, LlmConfig

__all__ = ["Generated", "GenerationConfig", "checked_prompt", "generate", "run_prompt"]


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
        rng: key for sampling, from which row i draws with `fold_in(rng, i)`; or `(B,)` keys, with
            which a row draws the same in whatever batch it stands. Needed with `do_sample` alone.

    Returns:
        New tokens, their number and their score for each row.

    Raises:
        ConfigError: an end, stop or pad id is outside the vocabulary, or sampling has no `rng`.
        DataError: prompt and answer are longer than the model's context, or a row is all padding.
        ValueError: both or neither of `tokens` and `embeddings` are given.
    """
    mask = checked_prompt(model.config, config, tokens, embeddings, mask, rng)
    return _generate(model, config, params, tokens, embeddings, mask, rng)


def checked_prompt(
    model: LlmConfig,
    config: GenerationConfig,
    tokens: jax.Array | None,
    embeddings: jax.Array | None,
    mask: jax.Array | None,
    rng: jax.Array | None,
) -> jax.Array | None:
    """Raises what `generate` raises, before anything runs; gives the mask as bool."""
    if (tokens is None) == (embeddings is None):
        raise ValueError("give either tokens or embeddings")
    ids = {"eos_ids": config.eos_ids, "pad_id": (config.pad_id,)}
    ids["stop_sequences"] = sum(config.stop_sequences, ())
    for field, values in ids.items():
        for value in values:
            if not 0 <= value < model.vocab_size:
                raise ConfigError(
                    f"{field}: {value} is no id of a vocabulary of {model.vocab_size}"
                )
    if config.do_sample and rng is None:
        raise ConfigError("do_sample=True needs rng=jax.random.key(...)")
    batch, length = (embeddings if tokens is None else tokens).shape[:2]
    lengths = np.full(batch, length)
    if mask is not None:
        mask = jnp.asarray(mask).astype(bool)
        if not isinstance(mask, jax.core.Tracer):
            lengths = np.asarray(mask).sum(axis=1)
    _check_lengths(lengths, model.context_length, config.max_new_tokens)
    return mask


def _check_lengths(lengths: np.ndarray, context: int | None, new: int) -> None:
    """Raises DataError where a prompt is empty, or leaves too little of the context."""
    if not lengths.all():
        row = int(np.argmin(lengths))
        raise DataError(f"prompt {row} has no tokens: give it at least the beginning token")
    row = int(np.argmax(lengths))
    if context is not None and lengths[row] + new > context:
        raise DataError(
            f"prompt {row} has {lengths[row]} tokens, and with max_new_tokens={new} that is more "
            f"than the {context} of the model's context; shorten the prompt or max_new_tokens"
        )


def run_prompt(
    model: Llm,
    config: GenerationConfig,
    params: Any,
    tokens: jax.Array | None,
    embeddings: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """Runs the prompt: logits `(B, V)` behind it, the cache, and the table of seen tokens."""
    if embeddings is None:
        embeddings = model.apply({"params": params}, tokens, method="embed_tokens")
    batch, length, _ = embeddings.shape
    # The last token is given out, never run: it needs no slot.
    logits, cache = prefill(model, params, embeddings, mask, length + config.max_new_tokens - 1)
    seen = None
    if config.repetition_penalty != 1:
        seen = seen_in_prompt(tokens, mask, (batch, model.config.vocab_size))
    return logits, cache, seen


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
    logits, cache, seen = run_prompt(model, config, params, tokens, embeddings, mask)
    if config.num_beams > 1:
        length = cache.positions.shape[1] - config.max_new_tokens + 1
        return beam_search(model, params, config, logits, cache, seen, prompt_length=length)
    keys = one_path.row_keys(rng if config.do_sample else None, logits.shape[0])
    state = one_path.start(config, logits, cache, seen, keys)
    state = one_path.advance(model, params, config, state, config.max_new_tokens)
    return Generated(state.tokens, state.lengths, state.scores)
