"""Rows of the training stream: row number in, decoded and augmented clip out.

Which clip a row shows, and every random draw made for it, follow from (seed, row) alone. That is
what makes the stream the same for any number of workers, threads and hosts, and lets a run resume
at any step.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from iv2_jax.data import augment, masking, sampling
from iv2_jax.data.badclips import BadClipLog
from iv2_jax.data.decode import DecodeError
from iv2_jax.data.sources import ClipSource, Frames
from iv2_jax.data.targets import Targets
from iv2_jax.errors import DataError

if TYPE_CHECKING:
    from iv2_jax.data.pipeline import DataConfig

_SHUFFLE_ROUNDS = 4  # of Grain's index shuffle, its own choice


class Order:
    """Which clip a row shows: epoch after epoch, each in its own order."""

    def __init__(self, num_clips: int, seed: int, *, shuffle: bool) -> None:
        """Takes the number of clips, the run's seed, and whether to shuffle at all."""
        self._num_clips = num_clips
        self._seed = seed
        self._shuffle = shuffle

    def clip(self, row: int, tries: int = 0) -> int:
        """Position of the clip that row `row` shows after `tries` undecodable ones."""
        epoch, at = divmod(row, self._num_clips)
        at = (at + tries) % self._num_clips
        if not self._shuffle or self._num_clips == 1:
            return at
        from grain.experimental import index_shuffle

        return index_shuffle(
            at,
            max_index=self._num_clips - 1,
            seed=_epoch_seed(self._seed, epoch),
            rounds=_SHUFFLE_ROUNDS,
        )


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    """32 bits from (seed, epoch); neighbouring seeds share no epoch's order."""
    return int(np.random.SeedSequence(seed, spawn_key=(0, epoch)).generate_state(1)[0])


def row_rng(seed: int, row: int) -> np.random.Generator:
    """The generator that every draw for a row comes from."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, row)))


class Rows:
    """Random access to the rows one process loads, in its order; a Grain data source.

    Item j is row `(start_step + j // b) * B + process * b + j % b` of the global stream, with B
    rows a global batch and b of them for this process.
    """

    def __init__(
        self,
        source: ClipSource,
        config: DataConfig,
        order: Order,
        *,
        seed: int,
        first_step: int,
        num_steps: int,
        global_batch: int,
        process_index: int,
        process_count: int,
        targets: Targets | None = None,
        records: np.ndarray | None = None,
    ) -> None:
        """Takes the clips, what to do with them, and which rows are this process's.

        `records` are the record numbers in `targets` by clip; a clip of record -1 did not decode
        when they were made and is passed over.
        """
        self._targets, self._records = targets, records
        self._source = source
        self._config = config
        self._order = order
        self._seed = seed
        self._first_step = first_step
        self._global_batch = global_batch
        self._local_batch = global_batch // process_count
        self._offset = process_index * self._local_batch
        self._length = num_steps * self._local_batch
        self._log = BadClipLog(config.bad_clip_log)
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def row_of(self, item: int) -> int:
        """Global row number of an item."""
        step, at = divmod(item, self._local_batch)
        return (self._first_step + step) * self._global_batch + self._offset + at

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = self.row_of(item)
        return self._eval_row(row) if self._config.eval else self._train_row(row)

    def _train_row(self, row: int) -> dict[str, Any]:
        """A row of the endless stream; clips that do not decode are passed over."""
        tries = min(self._config.max_tries, len(self._source))
        for replaced in range(tries):
            index = self._order.clip(row, replaced)
            rng = row_rng(self._seed, row)
            video = self._load(index, rng)
            if video is not None:
                return self._finish(video, index, replaced, rng)
        raise DataError(
            f"{tries} clips in a row do not decode, the last is "
            f"{self._source.name(self._order.clip(row, tries - 1))}; check the list with "
            "`iv2 data validate`"
        )

    def _eval_row(self, row: int) -> dict[str, Any]:
        """A row of one pass over the list; what does not decode is marked, not replaced."""
        index, rng = row, row_rng(self._seed, row)
        video = self._load(index, rng) if index < len(self._source) else None
        replaced = int(video is None and index < len(self._source))
        valid = video is not None
        if video is None:
            config = self._config
            shape = (config.num_views, config.num_frames, config.size, config.size, 3)
            video = np.zeros(shape, np.uint8)
        if index >= len(self._source):
            index = -1
        return self._finish(video, index, replaced, rng) | {"valid": np.bool_(valid)}

    def _finish(
        self, video: np.ndarray, index: int, replaced: int, rng: np.random.Generator
    ) -> dict[str, Any]:
        """The row as named arrays."""
        config = self._config
        row = {
            "video": video if config.num_views > 1 else video[0],
            "index": np.int32(index),
            "replaced": np.int32(replaced),
        }
        if self._targets is not None and self._records is not None:
            known = 0 <= index < len(self._records) and self._records[index] >= 0
            record = self._records[index] if known else -1
            row |= self._targets.zeros() if record < 0 else self._targets.read(int(record))
        if config.mask != "none" and config.mask_grid is not None:
            draw = masking.tube_mask if config.mask == "tube" else masking.random_mask
            row["visible"] = masking.to_visible(draw(config.mask_grid, config.mask_ratio, rng))
        return row

    def _load(self, index: int, rng: np.random.Generator) -> np.ndarray | None:
        """(V, T, S, S, 3) of one clip, or None, with the reason logged, when it does not decode."""
        if index in self._bad:
            return None
        name = self._source.name(index)
        if self._records is not None and self._records[index] < 0:
            with self._lock:
                self._bad.add(index)
            self._log.add(name, "did not decode when its targets were made")
            return None
        try:
            clip = self._source.open(index)
            try:
                video = load_views(clip, self._config, rng)
            finally:
                clip.close()
        except DecodeError as e:
            with self._lock:
                self._bad.add(index)
            self._log.add(name, e.reason)
            return None
        for warning in clip.warnings:
            self._log.add(name, warning, used=True)
        return video


def load_views(clip: Frames, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Samples, decodes and augments one clip.

    Args:
      clip: the open clip.
      config: how.
      rng: source of every draw; not used for evaluation views.

    Returns:
      (V, T, S, S, 3) uint8: V views; evaluation goes through the temporal views, and within
      each through the crops.
    """
    available = len(clip)
    train, evaluate = sampling.rule(config.sampling, stride=config.stride)
    picks: list[np.ndarray] = []
    for view in range(config.views):
        if config.eval or config.fixed_view:
            chosen = evaluate(available, config.num_frames, view, config.views)
        else:
            chosen = train(available, config.num_frames, rng)
        if config.released_minus_one:
            chosen = sampling.released_minus_one(chosen, available)
        picks.append(chosen)
    frames = clip.read(np.concatenate(picks))  # one pass over the file for all views
    return np.concatenate([_augment(part, config, rng) for part in _split(frames, picks)])


def _split(frames: np.ndarray, picks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The frames of each view."""
    return np.split(frames, np.cumsum([len(p) for p in picks])[:-1])


def _augment(frames: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """(C, T, S, S, 3): C crops of one temporal view."""
    if config.augment == "multiscale_crop":
        return augment.multiscale_crop(frames, config.size, rng, flip=config.flip)[None]
    return augment.eval_views(frames, config.size, short=config.short_side, num_crops=config.crops)
