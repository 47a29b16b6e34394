"""What the decoding loops share: settings, the edits of scores, and running the model by step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from iv2_jax.errors import ConfigError
from iv2_jax.models.kv_cache import KVCache
from iv2_jax.models.llm import Llm


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen and when a row ends (spec stage 3, 7).

    The defaults are greedy; the chat release samples with `top_p=0.9`.

    Attributes:
        max_new_tokens: tokens of a row at most.
        min_new_tokens: before so many tokens no `eos_ids` can come.
        eos_ids: each of them ends a row.
        stop_sequences: token sequences that end a row once it ends with one.
        pad_id: fills a row behind its end.
        do_sample: draw tokens instead of taking the best.
        temperature: divides the logits before drawing.
        top_k: draw among the k best; 0 for all.
        top_p: draw among the best whose probabilities first reach p together; 1 for all.
        repetition_penalty: positive logits of tokens already in the row are divided by it,
            negative ones multiplied; tokens of the prompt count if it was given as tokens.
        num_beams: width of the beam search; 1 for none.
        length_penalty: beams are ranked by log-probability / length ** length_penalty.
        early_stopping: end a beam search as soon as every row has `num_beams` ended beams,
            whether or not a running one could still overtake them.
    """

    max_new_tokens: int = 200
    min_new_tokens: int = 0
    eos_ids: tuple[int, ...] = (2,)
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    pad_id: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        for field, least in (("max_new_tokens", 1), ("top_k", 0), ("num_beams", 1)):
            if getattr(self, field) < least:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least {least}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens={self.min_new_tokens} must be in "
                f"[0, max_new_tokens={self.max_new_tokens}]"
            )
        for field in ("temperature", "repetition_penalty"):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f"{field}={getattr(self, field)} must be positive")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be in (0, 1]")
        if any(not stop for stop in self.stop_sequences):
            raise ConfigError("stop_sequences has an empty sequence, which would end every row")
        if self.num_beams > 1 and self.do_sample:
            raise ConfigError("num_beams > 1 needs do_sample=False: beams are searched, not drawn")


@struct.dataclass
class Generated:
    """What decoding gives.

    Attributes:
        tokens: int32 `(B, max_new_tokens)` new tokens, the ending one included, then `pad_id`.
        lengths: int32 `(B,)` tokens of each row, the ending one included.
        scores: float32 `(B,)` log-probability of the row under the model; of beams, divided by
            length ** length_penalty and after the edits of `edit_scores`.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


def edit_scores(
    scores: jax.Array, seen: jax.Array | None, count: jax.Array | int, config: GenerationConfig
) -> jax.Array:
    """Applies the repetition penalty and keeps rows from ending too early.

    Args:
        scores: `(B, V)` logits or log-probabilities.
        seen: bool `(B, V)`, tokens already in each row; None without a penalty.
        count: new tokens so far.
        config: the settings.

    Returns:
        `(B, V)`; a forbidden token has minus infinity.
    """
    if seen is not None:
        penalty = config.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if config.min_new_tokens and config.eos_ids:
        ends = np.zeros(scores.shape[-1], bool)
        ends[list(config.eos_ids)] = True
        early = jnp.asarray(count) < config.min_new_tokens
        scores = jnp.where(early & ends, -jnp.inf, scores)
    return scores


def sampling_logits(logits: jax.Array, config: GenerationConfig) -> jax.Array:
    """Applies temperature, then top-k, then top-p to `(B, V)`; what is left out gets -inf.

    Tokens that tie with the k-th best all stay. Top-p keeps the fewest best tokens whose
    probabilities together reach `top_p`, at least one.
    """
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(ranked, axis=-1) - ranked
        kept = (before < config.top_p).at[:, 0].set(True)
        kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return logits


def has_ended(tokens: jax.Array, count: jax.Array, config: GenerationConfig) -> jax.Array:
    """Says which rows end with an end token or a stop sequence.

    Args:
        tokens: int `(..., T)`.
        count: tokens of each row that are set, at least 1.
        config: the settings.

    Returns:
        bool `(...)`.
    """
    ended = jnp.zeros(tokens.shape[:-1], bool)
    for stop in (*((token,) for token in config.eos_ids), *config.stop_sequences):
        match = count >= len(stop)
        for back, token in enumerate(reversed(stop)):
            at = jnp.maximum(count - 1 - back, 0)
            match &= jax.lax.dynamic_index_in_dim(tokens, at, axis=-1, keepdims=False) == token
        ended |= match
    return ended


def mark_seen(seen: jax.Array | None, tokens: jax.Array) -> jax.Array | None:
    """Adds one token a row, `(B,)`, to the bool table `(B, V)`."""
    if seen is None:
        return None
    return seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)


def seen_in_prompt(
    tokens: jax.Array | None, mask: jax.Array | None, shape: tuple[int, int]
) -> jax.Array:
    """Table `(B, V)` of the prompt's tokens; empty for a prompt of embeddings, no padding."""
    seen = jnp.zeros(shape, bool)
    if tokens is None:
        return seen
    real = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    return seen.at[jnp.arange(shape[0])[:, None], tokens].max(real)


def prefill(
    model: Llm, params: Any, embeddings: jax.Array, mask: jax.Array | None, slots: int
) -> tuple[jax.Array, KVCache]:
    """Runs the prompt.

    Args:
        model: the language model.
        params: its parameters.
        embeddings: `(B, N, width)`.
        mask: bool `(B, N)`, False = padding on either side; None for none.
        slots: size of the cache to make, at least N.

    Returns:
        Logits `(B, V)` after each row's last real token, and the cache.
    """
    cache = model.empty_cache(embeddings.shape[0], slots)
    variables = {"params": params}
    out = model.apply(variables, embeddings, mask=mask, cache=cache, prefill=True, method="hidden")
    last = jnp.full(embeddings.shape[0], embeddings.shape[1] - 1)
    if mask is not None:
        last = last - jnp.argmax(mask[:, ::-1].astype(jnp.int32), axis=1)
    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    return model.apply(variables, hidden, method="logits"), out.cache


def unstacked(params: Mapping[str, Any]) -> dict[str, Any]:
    """Gives each block of an `Llm` arrays of its own, with which decoding on a CPU is faster.

    All that takes an `Llm`'s parameters takes these, but training. Compiling takes longer, for
    every block is compiled; the stacked arrays are copied, so let go of them.

    Args:
        params: the parameters, unboxed, with the blocks stacked.

    Returns:
        The same tree with a tuple of `depth` trees under `decoder/blocks`.
    """
    blocks = params["decoder"]["blocks"]
    depth = jax.tree.leaves(blocks)[0].shape[0]
    each = tuple(jax.tree.map(lambda leaf, n=n: leaf[n], blocks) for n in range(depth))
    return {**params, "decoder": {**params["decoder"], "blocks": each}}


def decode_step(
    model: Llm, params: Any, tokens: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs one token a row, `(B,)`; gives logits `(B, V)` and the longer cache."""
    out = model.apply({"params": params}, tokens[:, None], cache=cache)
    return out.logits[:, 0], out.cache
