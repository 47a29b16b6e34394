"""Which conversations share a row and which rows a batch: a function of (seed, step) alone.

Rows have one of few lengths, so that few programs are compiled. Either a row holds one conversation
and has the least length that it fits (`buckets`), or it holds as many as fit (`pack`), kept apart
by segment ids. A batch has rows of one kind (video, image, text), one length and one number of
views.

Every epoch has the same rows as far as sizes go; which conversation of a size goes where, and the
order of the batches, are drawn anew. So an epoch has the same number of steps every time, and a
step is found without going through those before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from iv2_jax.errors import ConfigError, DataError, nearest

KINDS = ("image", "text", "video")
_MODES = ("buckets", "pack")


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Shapes of rows and batches.

    Attributes:
      mode: `buckets` or `pack`.
      lengths: positions of a row; `pack` uses the largest alone.
      views: most views of a row; `buckets` takes the least number that fits, `pack` the largest.
      max_segments: `pack`: most conversations of a row.
      grain: `pack`: lengths are rounded up to multiples of it, and conversations of one rounded
        length change places from epoch to epoch. Larger mixes more and pads more.
      global_batch: rows of a batch, over all processes.
      same_tokens: shorter rows come in larger batches, as many tokens as the longest rows'.
      shuffle: another order every epoch.

    Raises:
      ConfigError: a number is out of range, or the mode not known.
    """

    mode: str = "buckets"
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    views: tuple[int, ...] = (1,)
    max_segments: int = 16
    grain: int = 8
    global_batch: int = 8
    same_tokens: bool = False
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"mode {self.mode!r} is not known{nearest(self.mode, _MODES)}")
        for name in ("lengths", "views"):
            values = getattr(self, name)
            if not values or min(values) < 1 or list(values) != sorted(set(values)):
                raise ConfigError(f"{name}={values}: ascending numbers from 1 on are needed")
        for name in ("max_segments", "grain", "global_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, is {getattr(self, name)}")

    def rows(self, length: int) -> int:
        """Rows of a batch of this row length; a multiple of `global_batch`."""
        return self.global_batch * (max(self.lengths) // length if self.same_tokens else 1)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is known of n conversations before anything is read.

    Attributes:
      lengths: int32 `(n,)` positions (`SequenceBuilder.longest`); 0 leaves one out.
      views: int32 `(n,)` views of all its media.
      kinds: int8 `(n,)` number in `KINDS`.
    """

    lengths: np.ndarray
    views: np.ndarray
    kinds: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the rows of a batch have in common: one compiled step each.

    Attributes:
      kind: 'video', 'image' or 'text'.
      length: positions L of a row.
      views: views V of a row, 0 for text.
      rows: rows of a batch over all processes.
    """

    kind: str
    length: int
    views: int
    rows: int


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """A batch: its shape and the conversations of each of its rows, none in rows that fill up.

    Attributes:
      shape: see `Shape`.
      epoch: which time the conversations are shown.
      rows: numbers of conversations.
    """

    shape: Shape
    epoch: int
    rows: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class _Group:
    """Rows of one shape. Row r holds places `ends[r - 1]` to `ends[r]` of the sorted order."""

    shape: Shape
    places: np.ndarray
    ends: np.ndarray

    @property
    def steps(self) -> int:
        """Batches; the last may have empty rows."""
        return -(-len(self.ends) // self.shape.rows)


class Plan:
    """The batches of every step.

    Attributes:
      epoch_steps: steps that show every conversation once.
      shapes: of all batches, in a fixed order.
      left_out: conversations without a target within their length.
      padding_share: share of an epoch's positions that are padding.
    """

    def __init__(self, sizes: Sizes, config: RowConfig, *, seed: int) -> None:
        """Takes the sizes, the shapes and the run's seed.

        Raises:
          ConfigError: a conversation fits no row.
          DataError: none is left.
        """
        self._seed, self._shuffle = seed, config.shuffle
        usable = np.flatnonzero(sizes.lengths > 0)
        self.left_out = len(sizes.lengths) - len(usable)
        if not len(usable):
            raise DataError(
                f"none of {len(sizes.lengths)} conversations has an answer within the longest row"
            )
        for name, most in (("lengths", config.lengths[-1]), ("views", config.views[-1])):
            values = getattr(sizes, name)[usable]
            if values.max() > most:
                at = int(usable[int(values.argmax())])
                raise ConfigError(
                    f"conversation {at} has {name}={values.max()}, rows have at most {most}: raise "
                    f"rows.{name}" + (" or lower max_length" if name == "lengths" else "")
                )
        lengths = sizes.lengths[usable].astype(np.int64)
        tokens = int(lengths.sum())
        if config.mode == "pack":
            lengths = np.minimum(-(-lengths // config.grain) * config.grain, config.lengths[-1])
        views, kinds = sizes.views[usable], sizes.kinds[usable]
        self._usable, self._key = usable, (-views, -lengths, kinds)
        order = np.lexsort(self._key)
        sizes = Sizes(lengths[order], views[order], kinds[order])
        build = _packed if config.mode == "pack" else _bucketed
        self._groups = [
            group
            for kind in range(len(KINDS))
            for group in build(sizes, np.flatnonzero(sizes.kinds == kind), KINDS[kind], config)
        ]
        self.shapes = tuple(group.shape for group in self._groups)
        self._steps = np.concatenate(
            [np.full(group.steps, i, np.int32) for i, group in enumerate(self._groups)]
        )
        self.epoch_steps = len(self._steps)
        room = sum(g.steps * g.shape.rows * g.shape.length for g in self._groups)
        self.padding_share = 1 - tokens / room
        self._known: tuple[int, np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]] | None = None

    def batch(self, step: int) -> PlannedBatch:
        """The batch of a step, from 0 on."""
        epoch, place = divmod(step, self.epoch_steps)
        members, order, earlier, rows = self._epoch(epoch)
        at = int(order[place])
        group = self._groups[at]
        first = int(earlier[place]) * group.shape.rows
        chosen = rows[at][first : first + group.shape.rows]
        found = [
            tuple(members[group.places[_start(group.ends, r) : group.ends[r]]].tolist())
            for r in chosen
        ]
        found += [()] * (group.shape.rows - len(found))
        return PlannedBatch(group.shape, epoch, tuple(found))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
        """Conversations by place, groups of the steps, batches before in the group, row orders."""
        if self._known is None or self._known[0] != epoch:
            rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(7, epoch)))
            tie = np.arange(len(self._usable), dtype=np.float64)
            if self._shuffle:
                tie = rng.random(len(self._usable))
            members = self._usable[np.lexsort((tie, *self._key))]
            rows = [np.arange(len(group.ends)) for group in self._groups]
            order = self._steps.copy()
            if self._shuffle:
                for numbers in rows:
                    rng.shuffle(numbers)
                rng.shuffle(order)
            earlier = np.empty_like(order)
            for i in range(len(self._groups)):
                places = np.flatnonzero(order == i)
                earlier[places] = np.arange(len(places))
            self._known = epoch, members, order, earlier, rows
        return self._known[1:]


def _start(ends: np.ndarray, row: int) -> int:
    """First place of a row."""
    return int(ends[row - 1]) if row else 0


def _fitting(values: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The least of `sizes` that holds each value."""
    return np.asarray(sizes)[np.searchsorted(sizes, values)]


def _bucketed(sizes: Sizes, places: np.ndarray, kind: str, config: RowConfig) -> list[_Group]:
    """Rows of one conversation. What does not fill a batch goes to the next longer rows."""
    groups = []
    views = np.zeros(len(places), np.int64)
    if kind != "text":
        views = _fitting(sizes.views[places], config.views)
    lengths = _fitting(sizes.lengths[places], config.lengths)
    for count in np.unique(views).tolist():
        mine = views == count
        carried = np.zeros(0, np.int64)
        longest = int(lengths[mine].max())
        for length in (n for n in config.lengths if n <= longest):
            # The longest first: those left over are then the shortest, and cost no more above.
            own = np.concatenate([carried, places[mine & (lengths == length)]])
            shape = Shape(kind, length, int(count), config.rows(length))
            kept = len(own) if length == longest else len(own) // shape.rows * shape.rows
            carried, own = own[kept:], own[:kept]
            if len(own):
                groups.append(_Group(shape, own, np.arange(1, len(own) + 1)))
    return groups


def _packed(sizes: Sizes, places: np.ndarray, kind: str, config: RowConfig) -> list[_Group]:
    """Rows filled by best fit, the longest conversations first."""
    if not len(places):
        return []
    length = config.lengths[-1]
    most = 0 if kind == "text" else config.views[-1]
    rows = best_fit(
        sizes.lengths[places].tolist(),
        [0] * len(places) if kind == "text" else sizes.views[places].tolist(),
        length,
        most,
        config.max_segments,
    )
    ends = np.cumsum([len(row) for row in rows])
    shape = Shape(kind, length, most, config.rows(length))
    return [_Group(shape, places[np.concatenate(rows)], ends)]


def best_fit(
    lengths: Sequence[int], views: Sequence[int], length: int, most_views: int, segments: int
) -> list[list[int]]:
    """Puts items into rows: each, in the order given, where it leaves the least room.

    Args:
      lengths: positions of the items, none above `length`.
      views: views of the items, none above `most_views`.
      length: positions of a row.
      most_views: views of a row.
      segments: most items of a row.

    Returns:
      The items of every row. Deterministic.
    """
    length, most_views = int(length), int(most_views)  # NumPy's numbers have no 1 << 64
    rows: list[list[int]] = []
    # Rows that take more, by views left and room left; bit r of a mask: there is one of room r.
    masks = [0] * (most_views + 1)
    waiting: dict[tuple[int, int], list[int]] = {}
    for item, (need, see) in enumerate(zip(lengths, views, strict=True)):
        best = None
        for left in range(see, most_views + 1):
            mask = masks[left] >> need
            if mask:
                room = need + (mask & -mask).bit_length() - 1
                if best is None or room < best[0]:
                    best = room, left
        if best is None:
            row, best = len(rows), (length, most_views)
            rows.append([])
        else:
            stack = waiting[best]
            row = stack.pop()
            if not stack:
                masks[best[1]] ^= 1 << best[0]
        rows[row].append(item)
        room, left = best[0] - need, best[1] - see
        if room and len(rows[row]) < segments:
            stack = waiting.setdefault((room, left), [])
            if not stack:
                masks[left] |= 1 << room
            stack.append(row)
    return rows
