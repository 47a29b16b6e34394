"""Batches of token sequences by step: padded or packed rows, for any number of processes.

A batch of b rows of L positions, V views and S segments is a dict of

* `tokens`, `visual_index`, `targets` int32 (b, L), as `dialogue.Example` has them; `visual_index`
  counts through the visual tokens of all views of the row;
* `segment_ids` int32 (b, L): 1, 2, ... for the conversations of a row, 0 for padding;
* `positions` int32 (b, L): from 0 on in every conversation, 0 at padding;
* `mask` bool (b, L): False at padding;
* `media` int32 (b, V): number of the view's file in `clips`, -1 for none; `view` int32 (b, V)
  which of the file's views it is; `view_segment` int32 (b, V), 0 for none. Not with text alone;
* with text for the bridge, `bridge_ids` and `bridge_mask` int32 (b, V, L');
* for the host: `kind`, `epoch`, `index` int32 (b, S) numbers of the conversations, -1 for none,
  and `cut` int32 (b,), positions that were cut off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from iv2_jax.data.dialogue import IGNORE
from iv2_jax.data.instruct.conversations import Conversation, Medium
from iv2_jax.data.instruct.plan import Plan, PlannedBatch, RowConfig, Shape, Sizes
from iv2_jax.data.instruct.sequence import SequenceBuilder, TokenSequence, cut
from iv2_jax.data.instruct.sizes import NumViews, measure, one_view
from iv2_jax.data.prompts import BridgeText
from iv2_jax.data.records import Clip
from iv2_jax.data.tokenizers.base import Tokenizer
from iv2_jax.errors import ConfigError


class TokenBatches:
    """The batches of one process by step; random access, no state, can be pickled.

    Attributes:
      plan: which conversations are where.
      clips: every file, or stretch of one, that is shown, once each.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        builder: SequenceBuilder,
        rows: RowConfig,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        num_views: NumViews = one_view,
        sizes: Sizes | None = None,
        bridge: tuple[Tokenizer, BridgeText] | None = None,
    ) -> None:
        """Plans all steps.

        Args:
          conversations: what is learnt from.
          builder: how they become sequences.
          rows: shapes of rows and batches.
          seed: of the order and of every draw, from 0 on.
          process_index: p; gives rows [p*B/P, (p+1)*B/P) of each batch.
          process_count: P, which must divide `rows.global_batch`.
          num_views: views of a medium; the same on every process.
          sizes: of `measure`, if it was run already.
          bridge: tokenizer of the Q-Former, and what it is told; None for nothing.

        Raises:
          ConfigError: the numbers do not fit each other.
          DataError: no conversation can be used.
        """
        if seed < 0:
            raise ConfigError(f"seed must be from 0 on, is {seed}")
        if not 0 <= process_index < process_count or rows.global_batch % process_count:
            raise ConfigError(
                f"process_index={process_index}, process_count={process_count}: global_batch="
                f"{rows.global_batch} must be a multiple of the processes, counted from 0 on"
            )
        self._sizes = measure(conversations, builder, num_views) if sizes is None else sizes
        self.plan = Plan(self._sizes, rows, seed=seed)
        numbers: dict[Medium, int] = {}
        for conversation in conversations:
            for medium in conversation.media:
                numbers.setdefault(medium, len(numbers))
        self.clips: tuple[Clip, ...] = tuple(medium.clip() for medium in numbers)
        self._numbers = numbers
        self._conversations, self._builder, self._rows = conversations, builder, rows
        self._seed, self._num_views = seed, num_views
        self._process = process_index, process_count
        self._bridge = None if bridge and bridge[1] is BridgeText.NONE else bridge

    def __getitem__(self, step: int) -> dict[str, Any]:
        """The batch of a step, from 0 on."""
        batch = self.plan.batch(step)
        index, count = self._process
        own = batch.shape.rows // count
        rows = batch.rows[index * own : (index + 1) * own]
        arrays = self._nothing(batch.shape, own)
        for at, members in enumerate(rows):
            self._fill({name: array[at] for name, array in arrays.items()}, members, batch)
        arrays["mask"] = arrays["segment_ids"] > 0
        arrays["cut"] = arrays["cut"][:, 0]
        return arrays | {"kind": batch.shape.kind, "epoch": batch.epoch}

    def shown(self) -> dict[tuple[str, int], int]:
        """Views of every file, by the kind of rows that show it and its number in `clips`."""
        found = {}
        for conversation in self._conversations:
            for medium in conversation.media:
                key = conversation.kind, self._numbers[medium]
                if key not in found:
                    found[key] = self._num_views(medium)
        return found

    def sequence(self, conversation: int, epoch: int) -> tuple[Conversation, TokenSequence]:
        """A conversation as an epoch shows it, and its sequence."""
        seeds = np.random.SeedSequence(self._seed, spawn_key=(8, epoch, conversation))
        shown = self._conversations[conversation]
        shown = self._builder.visit(shown, np.random.default_rng(seeds))
        return shown, self._builder.build(shown, [self._num_views(m) for m in shown.media])

    def _nothing(self, shape: Shape, rows: int) -> dict[str, np.ndarray]:
        """The arrays of empty rows."""
        segments = self._rows.max_segments if self._rows.mode == "pack" else 1
        pad = self._builder.tokenizer.pad_id
        fills = {"tokens": pad, "visual_index": -1, "targets": IGNORE}
        fills |= {"segment_ids": 0, "positions": 0}
        arrays = {n: np.full((rows, shape.length), v, np.int32) for n, v in fills.items()}
        arrays["index"] = np.full((rows, segments), -1, np.int32)
        arrays["cut"] = np.zeros((rows, 1), np.int32)
        if shape.views:
            for name, value in (("media", -1), ("view", 0), ("view_segment", 0)):
                arrays[name] = np.full((rows, shape.views), value, np.int32)
            if self._bridge is not None:
                tokenizer = self._bridge[0]
                long = (rows, shape.views, tokenizer.max_length)
                arrays["bridge_ids"] = np.full(long, tokenizer.pad_id, np.int32)
                arrays["bridge_mask"] = np.zeros(long, np.int32)
        return arrays

    def _fill(
        self, row: dict[str, np.ndarray], members: Sequence[int], batch: PlannedBatch
    ) -> None:
        """Puts conversations into a row, one after the other."""
        done, views = 0, 0
        reserved = int(self._sizes.lengths[list(members)].sum())
        for segment, number in enumerate(members, start=1):
            shown, sequence = self.sequence(number, batch.epoch)
            reserved -= int(self._sizes.lengths[number])
            sequence = cut(sequence, batch.shape.length - done - reserved)
            place = slice(done, done + sequence.length)
            row["tokens"][place] = sequence.tokens
            offset = views * self._builder.config.tokens_per_view
            is_slot = sequence.visual_index >= 0
            row["visual_index"][place] = np.where(is_slot, sequence.visual_index + offset, -1)
            row["targets"][place] = sequence.targets
            row["targets"][done : done + 1] = IGNORE  # nothing of its own stands before it
            row["segment_ids"][place] = segment
            row["positions"][place] = np.arange(sequence.length)
            row["index"][segment - 1] = number
            row["cut"] += sequence.cut
            self._fill_views(row, views, segment, shown, sequence)
            done, views = place.stop, views + len(sequence.views)

    def _fill_views(
        self,
        row: dict[str, np.ndarray],
        first: int,
        segment: int,
        shown: Conversation,
        sequence: TokenSequence,
    ) -> None:
        """Says what a conversation's views are, from number `first` of the row on."""
        found = sequence.views
        if not found:
            return
        place = slice(first, first + len(found))
        row["media"][place] = [self._numbers[shown.media[medium]] for medium, _ in found]
        row["view"][place] = [view for _, view in found]
        row["view_segment"][place] = segment
        if self._bridge is not None:
            tokenizer, mode = self._bridge
            ids, mask = tokenizer.encode_batch([bridge_text(shown, mode) or ""])
            row["bridge_ids"][place], row["bridge_mask"][place] = ids, mask


def leave_out(batch: dict[str, Any], media: Collection[int]) -> np.ndarray:
    """Takes conversations about files that cannot be read out of the loss, shapes as they are.

    The original shows another file with the same answers instead (spec stage3 trap 22).

    Args:
      batch: of `TokenBatches`; its targets are changed.
      media: numbers of the files in `TokenBatches.clips`.

    Returns:
      int32 (b,) how many conversations of each row that were.
    """
    count = np.zeros(len(batch["tokens"]), np.int32)
    shown = batch.get("media", np.zeros((0, 0), np.int32))
    for row, views in enumerate(np.isin(shown, list(media)) & (shown >= 0)):
        segments = np.unique(batch["view_segment"][row][views])
        batch["targets"][row, np.isin(batch["segment_ids"][row], segments)] = IGNORE
        count[row] = len(segments)
    return count


@dataclasses.dataclass
class Usage:
    """What batches were filled with.

    Attributes:
      positions: of all rows.
      tokens: positions that are no padding.
      targets: tokens that the loss asks for.
      views: places for views, and `used_views` those that show something.
      used_views: see `views`.
      cut: positions that were cut off.
      cut_rows: rows where some were.
    """

    positions: int = 0
    tokens: int = 0
    targets: int = 0
    views: int = 0
    used_views: int = 0
    cut: int = 0
    cut_rows: int = 0

    def add(self, batch: dict[str, Any]) -> None:
        """Counts a batch."""
        self.positions += batch["tokens"].size
        self.tokens += int(batch["mask"].sum())
        self.targets += int((batch["targets"] != IGNORE).sum())
        if "media" in batch:
            self.views += batch["media"].size
            self.used_views += int((batch["media"] >= 0).sum())
        self.cut += int(batch["cut"].sum())
        self.cut_rows += int((batch["cut"] > 0).sum())

    @property
    def padding_share(self) -> float:
        """Share of all positions that are padding."""
        return 1 - self.tokens / self.positions if self.positions else 0.0


class BatchStream(Iterator[dict[str, Any]]):
    """The endless stream of batches from a step on.

    Attributes:
      source: the batches by step.
      step: number of the next batch.
      usage: what the batches so far were filled with.
    """

    def __init__(self, source: TokenBatches, start_step: int = 0) -> None:
        """Takes the batches and the number of the first one."""
        if start_step < 0:
            raise ConfigError(f"start_step must be from 0 on, is {start_step}")
        self.source, self.step, self.usage = source, start_step, Usage()

    def __next__(self) -> dict[str, Any]:
        batch = self.source[self.step]
        self.step += 1
        self.usage.add(batch)
        return batch


def bridge_text(conversation: Conversation, mode: BridgeText) -> str | None:
    """Text for the Q-Former: None gives it none, which is not the same as an empty one.

    Args:
      conversation: of `SequenceBuilder.visit`: the instruction is that of its first turn.
      mode: what it is told (spec stage3 2.4).
    """
    if mode is BridgeText.NONE:
        return None
    first = conversation.turns[0]
    if mode is BridgeText.INSTRUCTION:
        return first.instruction
    return f"{first.instruction} {first.question}".strip()
