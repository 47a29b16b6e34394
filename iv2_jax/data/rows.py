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

from iv2_jax.data import (
    augment,
    augment_stage2,
    captions,
    masking,
    rand_augment,
    row_sounds,
    sampling,
)
from iv2_jax.data.badclips import BadClipLog
from iv2_jax.data.decode import DecodeError
from iv2_jax.data.kept import KeptClips
from iv2_jax.data.modalities import WITH_PICTURES, WITH_SOUND
from iv2_jax.data.sources import ClipSource, Frames
from iv2_jax.data.targets import Targets
from iv2_jax.errors import DataError

if TYPE_CHECKING:
    from iv2_jax.data.corpora import Spread
    from iv2_jax.data.data_config import DataConfig
    from iv2_jax.data.row_texts import RowTexts

_SHUFFLE_ROUNDS = 4  # of Grain's index shuffle, its own choice


class Order:
    """Which clip a row shows: epoch after epoch, each in its own order."""

    def __init__(
        self, num_clips: int, seed: int, *, shuffle: bool, spread: Spread | None = None
    ) -> None:
        """Takes the number of clips, the run's seed, whether to shuffle, and the clips' weights."""
        self._num_clips = num_clips if spread is None else len(spread)
        self._spread = spread
        self._seed = seed
        self._shuffle = shuffle

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._num_clips

    def clip(self, row: int, tries: int = 0) -> int:
        """Position of the clip that row `row` shows after `tries` undecodable ones."""
        epoch, at = divmod(row, self._num_clips)
        place = self._place(epoch, (at + tries) % self._num_clips)
        return place if self._spread is None else self._spread.clip(place, epoch)

    def _place(self, epoch: int, at: int) -> int:
        """The `at`-th place in an epoch's order."""
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
    """The generator that every draw for the pictures of a row comes from."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, row)))


def _side_rng(seed: int, row: int, modality: int) -> np.random.Generator:
    """The generator for a row's texts (0), sound (1) or which of its clip's views it shows (2)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, row, modality)))


def _view_rng(seed: int, view: int) -> np.random.Generator:
    """The generator for the pictures of a view that is shown more than once."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(4, view)))


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
        texts: RowTexts | None = None,
        match: np.ndarray | None = None,
    ) -> None:
        """Takes the clips, what to do with them, and which rows are this process's.

        `records` are the record numbers in `targets` by clip; a clip of record -1 did not decode
        when they were made and is passed over. `match` are the clips' match ids.
        """
        self._targets, self._records = targets, records
        self._texts, self._match = texts, match
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
        self._kept = KeptClips(int(config.keep_gb * 2**30))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    @property
    def side_bytes(self) -> int:
        """Bytes of a row beside its pictures."""
        arrays = [a for name, a in self.nothing().items() if name != "video"]
        stored = self._targets.nbytes if self._targets is not None else 0
        return stored + sum(np.asarray(a).nbytes for a in arrays)

    @property
    def num_visible(self) -> int:
        """Tokens that a mask leaves, 0 without one."""
        rng = np.random.default_rng(0)
        return len(self._mask(rng).get("visible", ()))

    def row_of(self, item: int) -> int:
        """Global row number of an item."""
        step, at = divmod(item, self._local_batch)
        return (self._first_step + step) * self._global_batch + self._offset + at

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = self.row_of(item)
        return self._eval_row(row) if self._config.eval else self.train_row(row)

    def train_row(self, row: int) -> dict[str, Any]:
        """A row of the endless stream, by its global number; bad clips are passed over."""
        tries = min(self._config.max_tries, len(self._source))
        for replaced in range(tries):
            index = self._order.clip(row, replaced)
            rng = row_rng(self._seed, row)
            arrays = self._load(index, row, rng)
            if arrays is not None:
                return self._finish(arrays, index, replaced, rng)
        raise DataError(
            f"{tries} clips in a row do not decode, the last is "
            f"{self._source.name(self._order.clip(row, tries - 1))}; check the list with "
            "`iv2 data validate`"
        )

    def _eval_row(self, row: int) -> dict[str, Any]:
        """A row of one pass over the list; what does not decode is marked, not replaced."""
        index, rng = row, row_rng(self._seed, row)
        arrays = self._load(index, row, rng) if index < len(self._source) else None
        replaced = int(arrays is None and index < len(self._source))
        valid = arrays is not None
        if arrays is None:
            arrays = self.nothing()
        if index >= len(self._source):
            index = -1
        return self._finish(arrays, index, replaced, rng) | {"valid": np.bool_(valid)}

    def nothing(self) -> dict[str, Any]:
        """The arrays of a row that has nothing to show."""
        config, arrays = self._config, {}
        if config.media in WITH_PICTURES:
            shape = (config.num_views, config.frames, config.size, config.size, 3)
            arrays["video"] = np.zeros(shape, np.uint8)
        if config.media in WITH_SOUND:
            arrays["fbank"] = np.zeros(row_sounds.feature_shape(config.audio), np.float32)
            arrays |= {"has_audio": np.bool_(False), "bad_sound": np.bool_(False)}
        if self._texts is not None:
            arrays |= self._texts.ids({})
        return arrays

    def _finish(
        self, arrays: dict[str, Any], index: int, replaced: int, rng: np.random.Generator
    ) -> dict[str, Any]:
        """The row as named arrays."""
        config = self._config
        row = arrays | {"index": np.int32(index), "replaced": np.int32(replaced)}
        if "video" in row and config.num_views == 1:
            row["video"] = row["video"][0]
        if self._match is not None:
            row["match_id"] = np.int32(self._match[index] if index >= 0 else -1)
        if self._targets is not None and self._records is not None:
            known = 0 <= index < len(self._records) and self._records[index] >= 0
            record = self._records[index] if known else -1
            row |= self._targets.zeros() if record < 0 else self._targets.read(int(record))
        return row | self._mask(rng)

    def _mask(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Tokens that are seen, where there is a mask."""
        config = self._config
        if config.mask == "none" or config.mask_grid is None:
            return {}
        draw = masking.tube_mask if config.mask == "tube" else masking.random_mask
        return {"visible": masking.to_visible(draw(config.mask_grid, config.mask_ratio, rng))}

    def _load(self, index: int, row: int, rng: np.random.Generator) -> dict[str, Any] | None:
        """What a clip has, or None, with the reason logged, when it cannot be used."""
        if index in self._bad:
            return None
        name = self._source.name(index)
        if self._records is not None and self._records[index] < 0:
            self._give_up(index, name, "did not decode when its targets were made")
            return None
        try:
            return self._read(index, row, rng, name)
        except DecodeError as e:
            self._give_up(index, name, e.reason)
            return None

    def _give_up(self, index: int, name: str, reason: str) -> None:
        """Never tries a clip again, and says why."""
        with self._lock:
            self._bad.add(index)
        self._log.add(name, reason)

    def _read(self, index: int, row: int, rng: np.random.Generator, name: str) -> dict[str, Any]:
        """Texts, pictures and sound of a clip, as the media type has them."""
        config, warnings = self._config, []
        train, texts = not config.eval, {}
        if self._texts is not None:
            texts = self._texts.pick(index, _side_rng(self._seed, row, 0) if train else None)
            if not texts and config.media == "text":
                raise DecodeError(name, f"has no caption named {' or '.join(self._texts.names)}")
        view = index
        if config.keep_views:
            at = int(_side_rng(self._seed, row, 2).integers(config.keep_views))
            view = index * config.keep_views + at
            rng = _view_rng(self._seed, view)
        arrays = self._kept.get(view)
        if arrays is None:
            arrays = self._read_media(index, row, rng, name, texts, warnings)
            self._kept.put(view, arrays)
        if self._texts is not None:
            arrays |= self._texts.ids(texts)
        for warning in warnings:
            self._log.add(name, warning, used=True)
        return arrays

    def _read_media(
        self,
        index: int,
        row: int,
        rng: np.random.Generator,
        name: str,
        texts: dict[str, str],
        warnings: list[str],
    ) -> dict[str, Any]:
        """Pictures and sound of a clip; adds to `warnings`."""
        config, arrays = self._config, {}
        if config.media in WITH_PICTURES:
            flip = config.flip and (
                config.released_flip or not any(map(captions.mentions_side, texts.values()))
            )
            clip = self._source.open(index)
            try:
                arrays["video"] = load_views(clip, config, rng, flip=flip)
            finally:
                clip.close()
            warnings += clip.warnings
        if config.media in WITH_SOUND:
            draws = None if config.eval else _side_rng(self._seed, row, 1)
            arrays |= self._sound(index, name, draws, warnings)
        return arrays

    def _sound(
        self, index: int, name: str, rng: np.random.Generator | None, warnings: list[str]
    ) -> dict[str, Any]:
        """Features of the sound; beside pictures, sound that is bad or missing is masked."""
        audio = self._config.audio
        features, usable, reason = row_sounds.load_or_none(
            self._source, index, audio, rng, warnings
        )
        if reason:
            warnings.append(f"its sound cannot be used: {reason}")
        if self._config.media == "audio" and (reason or not usable):
            raise DecodeError(name, reason or "has no sound")
        return {
            "fbank": features,
            "has_audio": np.bool_(usable),
            "bad_sound": np.bool_(bool(reason)),
        }


def sampling_rule(clip: Frames, config: DataConfig) -> tuple[sampling.Train, sampling.Eval]:
    """The config's (training, evaluation) rule for a clip."""
    if getattr(clip, "presampled", False) and len(clip) == config.frames:
        return sampling.all_frames, sampling.all_frames  # the rule was applied when it was stored
    single = len(clip) == 1 and config.sampling.startswith("fps")  # a picture has no rate
    return sampling.rule(
        "middle" if single else config.sampling,
        stride=config.stride,
        fps=getattr(clip, "fps", None),  # nor has a folder of pictures
        released=config.released_sampling,
    )


def load_views(
    clip: Frames, config: DataConfig, rng: np.random.Generator, *, flip: bool | None = None
) -> np.ndarray:
    """Samples, decodes and augments one clip.

    Args:
      clip: the open clip.
      config: how.
      rng: source of every draw; not used for evaluation views.
      flip: whether the clip may be mirrored in training; the config's by default.

    Returns:
      (V, T, S, S, 3) uint8: V views; evaluation goes through the temporal views, and within
      each through the crops.
    """
    available = len(clip)
    train, evaluate = sampling_rule(clip, config)
    picks: list[np.ndarray] = []
    shared = config.shared_frames and not (config.eval or config.fixed_view)
    for view in range(1 if shared else config.views):
        if config.eval or config.fixed_view:
            chosen = evaluate(available, config.frames, view, config.views)
        else:
            chosen = train(available, config.frames, rng)
        if config.released_minus_one:
            chosen = sampling.released_minus_one(chosen, available)
        picks.append(chosen)
    flip = config.flip if flip is None else flip
    frames = clip.read(np.concatenate(picks))  # one pass over the file for all views
    parts = _split(frames, picks) * (config.views if shared else 1)
    return np.concatenate([_augment(part, config, rng, flip) for part in parts])


def _split(frames: np.ndarray, picks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The frames of each view."""
    return np.split(frames, np.cumsum([len(p) for p in picks])[:-1])


def _augment(
    frames: np.ndarray, config: DataConfig, rng: np.random.Generator, flip: bool
) -> np.ndarray:
    """(C, T, S, S, 3): C crops of one temporal view."""
    if config.rand_augment is not None and not (config.eval or config.fixed_view):
        frames = rand_augment.rand_augment(frames, config.rand_augment, rng)
    if config.augment == "multiscale_crop":
        return augment.multiscale_crop(frames, config.size, rng, flip=flip)[None]
    if config.augment == "random_resized_crop":
        crop = augment_stage2.random_resized_crop(
            frames,
            config.size,
            rng,
            scale=config.crop_area,
            flip=flip,
            antialias=config.antialias,
        )
        return crop[None]
    if config.augment == "finetune_crop":
        return augment.random_resized_crop(
            frames, config.size, rng, scale=config.crop_area, flip=flip
        )[None]
    if config.augment == "stretch":
        return augment_stage2.stretch(frames, config.size, antialias=config.antialias)[None]
    return augment.eval_views(frames, config.size, short=config.short_side, num_crops=config.crops)
