"""Starts text models from Google's BERT, as the original's training does.

Stage 2 starts from bert-large-uncased (spec stage2 3), the Q-Former from bert-base-uncased (spec
stage3 2.2). Both add parts that BERT does not have; those are taken from a fresh model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import CheckpointError
from iv2_jax.interop.entries import Entry, from_torch, parameters

# Keys of BERT's files that some or all of our models do without.
_UNUSED = re.compile(
    r"pooler\..*|cls\.seq_relationship\..*|cls\.predictions\..*|embeddings\.position_ids"
    r"|embeddings\.token_type_embeddings\.weight"
)
_BERT_KEY = re.compile(r"(?:.*\.)?((?:embeddings|encoder|cls)\..*)")
_WORDS = "embeddings.word_embeddings.weight"


def from_released_bert(
    tensors: Mapping[str, Any],
    entries: Sequence[Entry],
    fresh: Mapping[str, Any],
    *,
    source: str = "the BERT file",
) -> dict[str, Any]:
    """Puts BERT's weights into a model made of its layers.

    Cross-attention, and what is no part of BERT (query tokens, projections), stay as in `fresh`.
    The queries' feed-forward of a Q-Former starts as a copy of the text's. Where the model's word
    table has more rows (the Q-Former's `[DEC]`), the further rows stay as in `fresh`.

    Args:
        tensors: `{key: array}` of a BERT of transformers, such as `load.open_tensors` gives;
            with or without `bert.` in front, its norms named weight and bias or gamma and beta.
        entries: the model's, from `bert_map` or `bridge_map`.
        fresh: newly initialised parameters of the model.
        source: what messages call the tensors.

    Returns:
        The model's parameters.

    Raises:
        CheckpointError: BERT lacks something, has more layers than the model, or is of another
            size; everything that does not fit is listed.
    """
    released = {_modern_name(key): tensors[key] for key in tensors}
    flat = traverse_util.flatten_dict(meta.unbox(dict(fresh)), sep="/")
    state: dict[str, Any] = {}
    used: set[str] = set()
    for entry in parameters(entries):
        if entry.path not in flat:
            raise CheckpointError(f"the fresh parameters lack {entry.path}")
        for key, own in zip(entry.torch_keys, entry.to_torch(flat[entry.path]), strict=True):
            match = _BERT_KEY.fullmatch(key)
            if match is None or ".crossattention." in key:
                state[key] = own
                continue
            name = match[1].replace("_query.", ".")
            if name in released:
                used.add(name)
                value = released[name]
                state[key] = _with_rows(np.asarray(value), own) if name == _WORDS else value
    left = [name for name in released if name not in used and not _UNUSED.fullmatch(name)]
    # Under their own names, so that the error lists them with all else that does not fit.
    return from_torch(state | {name: released[name] for name in left}, entries, source=source)


def _modern_name(key: str) -> str:
    """The key without `bert.`, its norm's parameters named weight and bias."""
    key = key.removeprefix("bert.")
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"\.beta$", ".bias", key))


def _with_rows(table: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The table `(V, D)` with the further rows of `own` `(V', D)`, V' >= V."""
    if table.ndim != 2 or table.shape[1:] != own.shape[1:]:
        return table
    return np.concatenate([table, own[len(table) :].astype(table.dtype)])
