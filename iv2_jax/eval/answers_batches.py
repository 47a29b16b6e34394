"""Batches of questions of few shapes, made while clips are being read.

A batch has questions of one kind of medium, one number of views and one padded length, so that few
programs are compiled; its rows are in no particular order. What cannot be asked comes out with the
reason.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from iv2_jax.data.decode import DecodeError
from iv2_jax.data.dialogue import pad_batch
from iv2_jax.data.instruct.sequence import TokenSequence
from iv2_jax.data.prompts import BridgeText
from iv2_jax.data.tokenizers.base import Tokenizer
from iv2_jax.errors import DataError
from iv2_jax.eval.answers_pixels import ClipViews
from iv2_jax.eval.answers_prompts import Question, Target, Writer

_AHEAD = 4  # questions read ahead for each thread


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A question as arrays.

    Attributes:
      number: of the question in its list.
      views: `(V, T, S, S, 3)` or None.
      sequences: the prompt alone, or one sequence for each option.
      places: what of each sequence is scored; empty for a prompt.
      bridge: text for the Q-Former, or None.
    """

    number: int
    views: np.ndarray | None
    sequences: tuple[TokenSequence, ...]
    places: tuple[np.ndarray, ...]
    bridge: str | None

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the questions of a batch have in common."""
        views = None if self.views is None else (self.views.shape, self.views.dtype)
        length = bucket(max(s.length for s in self.sequences))
        scored = bucket(max((len(p) for p in self.places), default=0), least=8)
        return views, length, scored


@dataclasses.dataclass(frozen=True)
class Unread:
    """A question that cannot be asked, and why."""

    number: int
    reason: str


def bucket(size: int, *, least: int = 64) -> int:
    """The next of `least`, 1.5 and 2 times it, 3 and 4 times, ...: lengths that are compiled."""
    at = least
    while size > at:
        if size <= at * 3 // 2:
            return at * 3 // 2
        at *= 2
    return at


class Reader:
    """Reads clips and writes questions; picks batches of one shape."""

    def __init__(
        self,
        writer: Writer,
        views: ClipViews,
        *,
        batch_size: int,
        bridge: tuple[Tokenizer, BridgeText] | None = None,
        threads: int = 2,
    ) -> None:
        """Takes how questions are written, how clips are read, and the rows of a batch."""
        self._writer, self._views, self._bridge = writer, views, bridge
        self._size, self._threads = batch_size, threads

    def batches(
        self, questions: Sequence[Question], *, score: bool
    ) -> Iterator[list[Prepared] | Unread]:
        """Yields batches, each of at most `batch_size` questions, and what cannot be asked.

        Args:
          questions: in an order in which those about one clip stand together.
          score: with the sequences of all options; False: the prompt alone.
        """
        waiting: dict[Any, list[Prepared]] = {}
        for item in self._prepared(questions, score):
            if isinstance(item, Unread):
                yield item
                continue
            rows = waiting.setdefault(item.shape, [])
            rows.append(item)
            if len(rows) == self._size:
                yield waiting.pop(item.shape)
        yield from waiting.values()

    def _prepared(self, questions: Sequence[Question], score: bool) -> Iterator[Prepared | Unread]:
        """All questions in order, some of them read ahead."""
        jobs: collections.deque[concurrent.futures.Future[Prepared | Unread]] = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            try:
                for number, question in enumerate(questions):
                    jobs.append(pool.submit(self._prepare, number, question, score))
                    if len(jobs) > self._threads * _AHEAD:
                        yield jobs.popleft().result()
                while jobs:
                    yield jobs.popleft().result()
            finally:
                for job in jobs:
                    job.cancel()

    def _prepare(self, number: int, question: Question, score: bool) -> Prepared | Unread:
        """Reads a question's clip and writes its sequences."""
        try:
            views = None if question.medium is None else self._views.load(question.medium)
            count = 0 if views is None else len(views)
            if score:
                targets = self._writer.targets(question, count)
            else:
                targets = [Target(self._writer.prompt_of(question, count), np.zeros(0, int))]
        except (DecodeError, DataError) as e:
            return Unread(number, str(e))
        told = None
        if self._bridge is not None and views is not None:
            told = self._writer.bridge_text(question, self._bridge[1])
        return Prepared(
            number,
            views,
            tuple(t.sequence for t in targets),
            tuple(t.places for t in targets) if score else (),
            told,
        )

    def arrays(self, rows: Sequence[Prepared], options: int, pad_id: int) -> dict[str, Any]:
        """The arrays of a batch of `batch_size` rows; the last question fills the batch up.

        Args:
          rows: a batch.
          options: O, sequences of a row; the first one fills up.
          pad_id: of the language model.

        Returns:
          `tokens`, `visual_index`, `mask` `(b, O, L)`, `places` and `wanted` `(b, O, S)` (`wanted`
          -1 where nothing is scored), and `media`: what `Chat` takes, pixels not normalised.
        """
        filled = [*rows, *[rows[-1]] * (self._size - len(rows))]
        views, length, scored = rows[0].shape
        flat, places = [], []
        for row in filled:
            missing = options - len(row.sequences)
            flat += [*row.sequences, *[row.sequences[0]] * missing]
            places += [*row.places, *[np.zeros(0, int)] * (options - len(row.places))]
        batch = pad_batch(flat, length, pad_id)
        shape = (self._size, options, length)
        arrays: dict[str, Any] = {
            name: batch[name].reshape(shape) for name in ("tokens", "visual_index", "mask")
        }
        arrays["places"] = np.zeros((len(flat), scored), np.int32)
        arrays["wanted"] = np.full((len(flat), scored), -1, np.int32)
        for at, (sequence, chosen) in enumerate(zip(flat, places, strict=True)):
            # The token before a place says what it expects there.
            arrays["places"][at, : len(chosen)] = chosen - 1
            arrays["wanted"][at, : len(chosen)] = sequence.tokens[chosen]
        for name in ("places", "wanted"):
            arrays[name] = arrays[name].reshape(self._size, options, scored)
        arrays["media"] = {}
        if views is not None:
            arrays["media"]["video"] = np.stack([row.views for row in filled])
            if self._bridge is not None:
                ids, mask = self._bridge[0].encode_batch([row.bridge or "" for row in filled])
                arrays["media"] |= {"bridge_ids": ids, "bridge_mask": mask}
        return arrays
