"""Batches with rows of every media type, in one shape: mode `padded` of `mixing`.

Besides what `pipeline.make_loader` gives, a batch has

* `has_video` bool (b,): False where the row's media type has no pictures, and `video` is zeros;
* `has_audio` bool (b,): False where there is no sound that can be used, and `fbank` is zeros;
* padding in `text_<caption>` where a row has no such caption.

Pictures fill all T frames. `index` and `match_id` count through the types in the order of their
names, so that they are different for different types. Every batch has the same number of rows of
each type, spread evenly over the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from iv2_jax.data import pipeline
from iv2_jax.data.badclips import BadClipMonitor
from iv2_jax.data.corpora import JoinedSource
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.modalities import WITH_PICTURES
from iv2_jax.data.rows import Rows
from iv2_jax.data.sources import ClipSource
from iv2_jax.errors import ConfigError

if TYPE_CHECKING:
    from iv2_jax.data.mixing import MixConfig

_EQUAL = ("size", "mask", "mask_ratio", "mask_grid")  # of all types with pictures


class PaddedRows:
    """Rows of one process, of all media types; a Grain data source."""

    def __init__(
        self,
        rows: Mapping[str, Rows],
        sizes: Mapping[str, int],
        firsts: Mapping[str, int],
        *,
        first_step: int,
        process_index: int,
        process_count: int,
    ) -> None:
        """Takes the types' rows, how many of each a batch has, and where their numbers begin."""
        self._rows, self._firsts = dict(rows), dict(firsts)
        self._sizes = dict(sizes)
        self._global_batch = sum(sizes.values())
        self._local_batch = self._global_batch // process_count
        self._offset = process_index * self._local_batch
        self._first_step = first_step
        places = sorted(((k + 0.5) / n, name, k) for name, n in sizes.items() for k in range(n))
        self._places = [(name, k) for _, name, k in places]
        self._empty = _common_row(self._rows)

    def __len__(self) -> int:
        return pipeline.ENDLESS_STEPS * self._local_batch

    @property
    def side_bytes(self) -> int:
        """Bytes of a row beside its pictures."""
        return sum(np.asarray(a).nbytes for name, a in self._empty.items() if name != "video")

    def row_of(self, item: int) -> int:
        """Global row number of an item."""
        step, at = divmod(item, self._local_batch)
        return (self._first_step + step) * self._global_batch + self._offset + at

    def origin(self, row: int) -> tuple[str, int]:
        """(media type, row of that type's own stream) of a global row."""
        step, at = divmod(row, self._global_batch)
        name, k = self._places[at]
        return name, step * self._sizes[name] + k

    def __getitem__(self, item: int) -> dict[str, Any]:
        name, number = self.origin(self.row_of(item))
        row = self._rows[name].train_row(number)
        first = self._firsts[name]
        match = int(row.pop("match_id", row["index"])) + first
        row |= {"index": np.int32(row["index"] + first), "match_id": np.int32(match)}
        if "video" in row:
            row["has_video"] = np.bool_(True)
            row["video"] = _filled(row["video"], len(self._empty["video"]))
        return self._empty | row


def _filled(video: np.ndarray, frames: int) -> np.ndarray:
    """(T, S, S, 3): a picture in every frame."""
    return video if len(video) == frames else np.repeat(video, frames, axis=0)


def _common_row(rows: Mapping[str, Rows]) -> dict[str, Any]:
    """A row that has nothing to show, with every array of any type."""
    common: dict[str, Any] = {"index": np.int32(-1), "replaced": np.int32(0)}
    for name, part in rows.items():
        arrays = part.nothing()
        if "video" in arrays:
            arrays["video"] = arrays["video"][0]
            arrays["has_video"] = np.bool_(False)
            if part.num_visible:
                arrays["visible"] = np.arange(part.num_visible, dtype=np.int32)
        if any(key.startswith("text_") for key in arrays):
            arrays["match_id"] = np.int32(-1)
        for key, value in arrays.items():
            known = common.get(key, value)
            if key == "video" and 1 in (len(known), len(value)):  # a picture fills all frames
                common[key] = max(known, value, key=len)
                continue
            if not np.array_equal(known, value):
                raise ConfigError(
                    f"media.{name}: {key} of {np.shape(value)} is unlike that of other types, "
                    f"{np.shape(known)}: mode 'padded' needs one shape and one tokenizer for all"
                )
            common[key] = value
    return common


def _check(config: MixConfig) -> None:
    """Refuses settings that rows of one batch cannot have side by side."""
    pictures = {name: d for name, d in config.media.items() if d.media in WITH_PICTURES}
    for name, data in config.media.items():
        if data.targets:
            raise ConfigError(f"media.{name}.targets: mode 'padded' has none; use 'alternate'")
        if data.num_views > 1:
            raise ConfigError(f"media.{name}: mode 'padded' takes one view of a clip")
    for field in _EQUAL:
        if len({getattr(data, field) for data in pictures.values()}) > 1:
            raise ConfigError(
                f"media.{{{','.join(sorted(pictures))}}}.{field} must be equal in mode 'padded'"
            )


def batch_shares(
    config: MixConfig, sources: Mapping[str, ClipSource], *, seed: int, global_batch: int
) -> dict[str, int]:
    """Rows of each media type in a global batch: as said, or shared out by weights or lengths."""
    from iv2_jax.data.mixing import share_out

    named, rest = config.batch_sizes, sorted(set(config.media) - set(config.batch_sizes))
    left = global_batch - sum(named.values())
    if left < len(rest) or (left and not rest):
        raise ConfigError(
            f"batch_sizes take {sum(named.values())} of {global_batch} rows, which leaves {left} "
            f"for {len(rest)} further media types; in mode 'padded' all add up to the batch size"
        )
    weights = config.weights or {
        name: len(pipeline.make_order(config.media[name], source, seed))
        for name, source in sources.items()
    }
    return dict(named) | (share_out(left, {name: weights[name] for name in rest}) if rest else {})


def make_loader(
    config: MixConfig,
    sources: Mapping[str, ClipSource],
    *,
    seed: int,
    seeds: Mapping[str, int],
    global_batch: int,
    process_index: int,
    process_count: int,
    start_step: int,
) -> tuple[pipeline.Loader, int]:
    """Builds the loader of one process.

    Args:
      config: what is mixed.
      sources: the clips by media type.
      seed: the run's.
      seeds: of each type's order and draws.
      global_batch: rows of a batch over all processes and types.
      process_index: which process.
      process_count: of how many.
      start_step: number of the first batch.

    Returns:
      The loader, and the steps that show about as many rows as the lists have.

    Raises:
      ConfigError: settings that do not fit each other.
    """
    pipeline.check_rows(seed, global_batch, process_index, process_count, start_step, None)
    _check(config)
    shares = batch_shares(config, sources, seed=seed, global_batch=global_batch)
    orders = {
        name: pipeline.make_order(config.media[name], source, seeds[name])
        for name, source in sources.items()
    }
    parts = {
        name: pipeline.make_rows(
            pipeline.own_log(config.media[name], process_index, process_count),
            source,
            orders[name],
            seed=seeds[name],
            first_step=0,
            num_steps=0,
            global_batch=shares[name],
            process_index=0,
            process_count=1,
        )
        for name, source in sources.items()
    }
    firsts, total = {}, 0
    for name, source in sources.items():
        firsts[name], total = total, total + len(source)
    rows = PaddedRows(
        parts,
        shares,
        firsts,
        first_step=start_step,
        process_index=process_index,
        process_count=process_count,
    )

    def bad_clips(row: int, replaced: int) -> list[str]:
        name, number = rows.origin(row)
        return [sources[name].name(orders[name].clip(number, i)) for i in range(replaced)]

    settings = _shared_settings(config)
    local_batch = global_batch // process_count
    joined = JoinedSource(
        list(sources.values()),
        (),
        [np.arange(len(source)) for source in sources.values()],
        [clip for source in sources.values() for clip in source.clips],
    )
    loader = pipeline.Loader(
        joined,
        rows,
        pipeline.batches(rows, settings, local_batch),
        BadClipMonitor(settings.max_bad_share, bad_clips),
        local_batch=local_batch,
        first_step=start_step,
        last_step=None,
    )
    return loader, max(sum(map(len, orders.values())) // global_batch, 1)


def _shared_settings(config: MixConfig) -> DataConfig:
    """What the types' settings say together about pictures' sizes, workers and bad clips."""
    every = list(config.media.values())
    pictures = [data for data in every if data.media in WITH_PICTURES]
    most = {
        name: max(getattr(data, name) for data in every)
        for name in ("num_workers", "threads", "prefetch", "max_bad_share")
    }
    return dataclasses.replace(max(pictures or every, key=lambda data: data.frames), **most)
