"""Generation that gives tokens out while it runs, a few at a time.

The same steps as `generate`, stopped every `chunk` tokens: the state stays on the device and is
handed from call to call, and how far to go is a number the program is given, so one program runs
all of them. `data.tokenizers.text_stream` turns the tokens into text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from iv2_jax.errors import ConfigError
from iv2_jax.models import one_path
from iv2_jax.models.chat import Chat, embed_prompts
from iv2_jax.models.decoding import GenerationConfig
from iv2_jax.models.generate import checked_prompt, run_prompt
from iv2_jax.models.llm import Llm
from iv2_jax.models.one_path import PathState


def stream(
    model: Llm,
    params: Any,
    config: GenerationConfig,
    *,
    tokens: jax.Array | None = None,
    embeddings: jax.Array | None = None,
    mask: jax.Array | None = None,
    rng: jax.Array | None = None,
    chunk: int = 4,
) -> Iterator[list[list[int]]]:
    """Continues a batch of prompts, token by token those of `generate`.

    The first step gives one token a row, so that something can be shown as soon as the prompt has
    run; each further one `chunk`. Not going on with the iterator stops the work.

    Args:
        model: as in `generate`.
        params: as in `generate`.
        config: as in `generate`, without beams.
        tokens: as in `generate`.
        embeddings: as in `generate`.
        mask: as in `generate`.
        rng: as in `generate`.
        chunk: tokens of a row between two yields.

    Returns:
        Iterator of each row's new tokens, the ending one included; rows that have ended give none.

    Raises:
        ConfigError, DataError, ValueError: as in `generate`, before anything runs; also where
            beams or a `chunk` below 1 are asked for.
    """
    if config.num_beams > 1:
        raise ConfigError("num_beams > 1 cannot be streamed: the best beam is known at the end")
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} must be at least 1")
    mask = checked_prompt(model.config, config, tokens, embeddings, mask, rng)
    rng = rng if config.do_sample else None

    def run() -> Iterator[list[list[int]]]:
        state = _start(model, config, params, tokens, embeddings, mask, rng)
        shown = 0
        while True:
            count, lengths, ended = jax.device_get((state.count, state.lengths, state.ended))
            new = np.asarray(state.tokens[:, shown:count])
            yield [row[: max(0, n - shown)].tolist() for row, n in zip(new, lengths, strict=True)]
            shown = int(count)
            if ended.all() or shown >= config.max_new_tokens:
                return
            state = _advance(
                model, config, params, state, min(shown + chunk, config.max_new_tokens)
            )

    return run()


def stream_answers(
    model: Chat,
    params: Mapping[str, Any],
    config: GenerationConfig,
    tokens: jax.Array,
    visual_index: jax.Array,
    mask: jax.Array | None = None,
    *,
    rng: jax.Array | None = None,
    chunk: int = 4,
    **media: jax.Array | None,
) -> Iterator[list[list[int]]]:
    """Answers a batch of prompts, token by token those of `chat.generate_answers`.

    Args:
        model: the dialogue model.
        params: its parameters, unboxed.
        config: as in `stream`.
        tokens: int `(B, L)` ids; any at slots.
        visual_index: int `(B, L)`, see `Chat`.
        mask: bool `(B, L)`, False at padding, left or right; None for none.
        rng: as in `stream`.
        chunk: as in `stream`.
        **media: `video` or `features`, `bridge_ids` and `bridge_mask` of `Chat`.

    Returns:
        As `stream`.

    Raises:
        ConfigError, DataError: as in `stream`, or an input does not fit the model.
    """
    embeddings, _ = embed_prompts(model, params, tokens, visual_index, media)
    llm = Llm(model.config.llm)
    prompt = {"embeddings": embeddings, "mask": mask, "rng": rng}
    return stream(llm, params["llm"], config, chunk=chunk, **prompt)


@partial(jax.jit, static_argnames=("model", "config"))
def _start(
    model: Llm,
    config: GenerationConfig,
    params: Any,
    tokens: jax.Array | None,
    embeddings: jax.Array | None,
    mask: jax.Array | None,
    rng: jax.Array | None,
) -> PathState:
    """Runs the prompt and chooses each row's first token."""
    logits, cache, seen = run_prompt(model, config, params, tokens, embeddings, mask)
    keys = one_path.row_keys(rng, logits.shape[0])
    return one_path.start(config, logits, cache, seen, keys)


@partial(jax.jit, static_argnames=("model", "config"), donate_argnames="state")
def _advance(
    model: Llm, config: GenerationConfig, params: Any, state: PathState, until: jax.Array
) -> PathState:
    """Goes on until there are `until` tokens; the state's memory is used again."""
    return one_path.advance(model, params, config, state, until)
