"""Sizes of conversations, found once by tokenizing all of them and kept in a file."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import multiprocessing
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from iv2_jax.data.instruct.conversations import Conversation, Medium
from iv2_jax.data.instruct.plan import KINDS, Sizes
from iv2_jax.data.instruct.sequence import SequenceBuilder
from iv2_jax.errors import DataError

NumViews = Callable[[Medium], int]
_CHUNK = 2048  # conversations handed to a process at a time


def one_view(medium: Medium) -> int:
    """Views of a medium without tiles."""
    return 1


def measure(
    conversations: Sequence[Conversation],
    builder: SequenceBuilder,
    num_views: NumViews = one_view,
    *,
    workers: int = 0,
    cache: str = "",
) -> Sizes:
    """Finds the sizes of conversations.

    Args:
      conversations: n of them.
      builder: how they become sequences.
      num_views: views of a medium; the same on every process.
      workers: processes that share the work; 0 does it in this one.
      cache: file (`.npz`) to keep the sizes in. One of other conversations, views, settings or of
        another tokenizer is written anew.

    Raises:
      DataError: the cache cannot be written.
    """
    views = [[num_views(medium) for medium in c.media] for c in conversations]
    mark = _fingerprint(conversations, views, builder) if cache else ""
    lengths = _stored(cache, mark)
    if lengths is None:
        starts = range(0, len(conversations), _CHUNK)
        parts = [(conversations[i : i + _CHUNK], views[i : i + _CHUNK]) for i in starts]
        if workers and len(parts) > 1:
            found = _in_processes(parts, builder, min(workers, len(parts)))
        else:
            found = [_lengths(builder, *part) for part in parts]
        lengths = np.array([length for part in found for length in part], np.int32)
        if cache:
            _store(cache, mark, lengths)
    return Sizes(
        lengths,
        np.array([sum(counts) for counts in views], np.int32),
        np.array([KINDS.index(c.kind) for c in conversations], np.int8),
    )


def _lengths(
    builder: SequenceBuilder,
    conversations: Sequence[Conversation],
    views: Sequence[Sequence[int]],
) -> list[int]:
    """Positions that each conversation needs."""
    return [builder.longest(c, counts) for c, counts in zip(conversations, views, strict=True)]


def _in_processes(
    parts: Sequence[tuple[Sequence[Conversation], Sequence[Sequence[int]]]],
    builder: SequenceBuilder,
    workers: int,
) -> list[list[int]]:
    """The same by worker processes; new ones, as forking a program with threads may hang."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(_lengths, builder, *part) for part in parts]
        return [job.result() for job in jobs]


def _fingerprint(
    conversations: Sequence[Conversation], views: Sequence[Sequence[int]], builder: SequenceBuilder
) -> str:
    """A number that changes with all that the sizes follow from."""
    tokenizer = builder.tokenizer
    # Ids of a text tell tokenizers apart that have as many tokens.
    probe = tokenizer.tokenize_plain("The quick brown fox: 12 naïve 日本語 cats, isn't it?")
    settings = dataclasses.astuple(builder.config), dataclasses.astuple(builder.template)
    about = (settings, type(tokenizer).__name__, tokenizer.vocab_size, probe)
    mark = hashlib.blake2b(repr(about).encode(), digest_size=16)
    for conversation, counts in zip(conversations, views, strict=True):
        kinds = [medium.kind for medium in conversation.media]
        shown = (conversation.turns, conversation.ordered, conversation.message, kinds, counts)
        mark.update(repr(shown).encode("utf-8", "surrogatepass"))
    return mark.hexdigest()


def _stored(cache: str, mark: str) -> np.ndarray | None:
    """Lengths of a file that was written for the same; None where there is none."""
    if not cache or not os.path.exists(cache):
        return None
    try:
        with np.load(cache) as file:
            return file["lengths"] if str(file["mark"]) == mark else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # broken: found anew
        return None


def _store(cache: str, mark: str, lengths: np.ndarray) -> None:
    """Writes the file whole or not at all; several processes may at once."""
    try:
        folder = Path(cache).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            np.savez(file, mark=np.array(mark), lengths=lengths)
        os.replace(file.name, cache)
    except OSError as e:
        raise DataError(f"{cache}: cannot be written: {e.strerror}") from e
