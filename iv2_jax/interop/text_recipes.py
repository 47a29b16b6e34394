"""Starts text models from Google's BERT, as the original's training does.

Stage 2 starts from bert-large-uncased (spec stage2 3), the Q-Former from bert-base-uncased (spec
stage3 2.2). Both add parts that BERT does not have; those are taken from a fresh model. Any model
in BERT's layout does, MiniLM for one, also with fewer layers than ours (`bert_tensors`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import CheckpointError
from iv2_jax.interop.entries import Entry, from_torch, parameters, plan
from iv2_jax.interop.tensor_file import TensorRef

# Keys of BERT's files that some or all of our models do without.
_UNUSED = re.compile(
    r"pooler\..*|cls\.seq_relationship\..*|cls\.predictions\..*|embeddings\.position_ids"
    r"|embeddings\.token_type_embeddings\.weight"
)
_BERT_KEY = re.compile(r"(?:.*\.)?((?:embeddings|encoder|cls)\..*)")
_WORDS = "embeddings.word_embeddings.weight"
_DROPPED = re.compile(r"pooler\.|cls\.(?!predictions\.decoder)")  # the others are made anew
_PLACES = "embeddings.position_embeddings.weight"
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")


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
    released = {modern_name(key): tensors[key] for key in tensors}
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


def bert_tensors(
    tensors: Mapping[str, Any],
    entries: Sequence[Entry],
    draw: Callable[[], Mapping[str, Any]],
    *,
    source: str = "the BERT file",
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """What a text tower takes from a file in BERT's layout, which may have fewer layers.

    Taken is whatever both have. Cross-attention that the file lacks, layers beyond the file's and
    a masked-LM head that it lacks stay fresh; the file's pooler and next-sentence head are dropped,
    and so is its masked-LM head if the tower has none. A longer position table is cut.

    Args:
        tensors: `{key: tensor}` of a BERT of transformers or of a stage-2 text tower, with or
            without `bert.` in front, norms named weight and bias or gamma and beta.
        entries: the tower's, from `bert_map`.
        draw: gives freshly initialised parameters of the tower, `{path: array}` by the entries'
            paths; called only if a stack is filled in part.
        source: what messages call the tensors.

    Returns:
        `{torch key: tensor}` of the entries that are filled, complete; `{path: reason}` of those
        that stay fresh; names of the file's tensors that the tower has no use for.

    Raises:
        CheckpointError: the file has more layers than the tower, lacks something else, or is of
            another size; everything that does not fit is listed.
    """
    released = {modern_name(key): tensors[key] for key in tensors}
    numbers = [int(m[1]) for name in released if (m := _LAYER.match(name))]
    depth = max(numbers, default=-1) + 1
    has_head = any(name.startswith("cls.predictions.transform") for name in released)
    state: dict[str, Any] = {}
    fresh: dict[str, str] = {}
    used: set[str] = set()
    kept: list[Entry] = []
    for entry in parameters(entries):
        names = [_BERT_KEY.fullmatch(key)[1] for key in entry.torch_keys]
        have = [name in released for name in names]
        if not any(have) and (reason := _why_fresh(names[0], depth, has_head)):
            fresh[entry.path] = reason
            continue
        kept.append(entry)
        used.update(name for name in names if name in released)
        beyond = [not h and _number(name) >= depth for name, h in zip(names, have, strict=True)]
        own = entry.to_torch(draw()[entry.path]) if any(beyond) else [None] * len(names)
        for key, name, spare, part in zip(entry.torch_keys, names, beyond, own, strict=True):
            if name in released:
                state[key] = (
                    _first_rows(released[name], entry) if name == _PLACES else released[name]
                )
            elif spare:
                state[key] = part
        if any(beyond):
            fresh[f"{entry.path}[{beyond.index(True)}:]"] = f"the file has {depth} layers"
    left = [name for name in released if name not in used and not _UNUSED.fullmatch(name)]
    plan(state | {name: released[name] for name in left}, kept, source=source)
    dropped = [name for name in released if name not in used and _DROPPED.match(name)]
    return state, fresh, dropped


def _why_fresh(name: str, depth: int, has_head: bool) -> str:
    """Why a parameter that a BERT file lacks may stay fresh; "" if it may not."""
    if ".crossattention." in name:
        return "the file has no cross-attention"
    if _number(name) >= depth > 0:
        return f"the file has {depth} layers"
    if name.startswith("cls.") and not has_head:
        return "the file has no masked-LM head"
    return ""


def _number(name: str) -> int:
    """Number of the layer that a key belongs to, -1 if to none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _first_rows(table: Any, entry: Entry) -> Any:
    """The first rows of a position table that is longer than the tower's."""
    rows, width = entry.torch_shape
    if len(table.shape) != 2 or table.shape[1] != width or table.shape[0] <= rows:
        return table
    return TensorRef((rows, width), np.dtype(table.dtype), lambda: np.asarray(table)[:rows])


def modern_name(key: str) -> str:
    """The key without `bert.`, its norm's parameters named weight and bias."""
    key = key.removeprefix("bert.")
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"\.beta$", ".bias", key))


def _with_rows(table: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The table `(V, D)` with the further rows of `own` `(V', D)`, V' >= V."""
    if table.ndim != 2 or table.shape[1:] != own.shape[1:]:
        return table
    return np.concatenate([table, own[len(table) :].astype(table.dtype)])
