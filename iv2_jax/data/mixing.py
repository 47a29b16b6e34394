"""Batches of several media types: one type a step, or all of them in every batch.

Which media type a step has, and which of its batches, follow from (seed, step) alone, so that all
hosts agree without talking to each other and a run resumes at any step exactly.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from iv2_jax.data import padding, pipeline
from iv2_jax.data.closing import Closing
from iv2_jax.data.corpora import open_data
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.modalities import MEDIA
from iv2_jax.data.pipeline import Loader
from iv2_jax.data.sources import ClipSource
from iv2_jax.errors import ConfigError, nearest

MIXED = "mixed"  # media type of a batch that has rows of all
_MODES = ("alternate", "padded")


@dataclasses.dataclass(frozen=True)
class MixConfig:
    """What to load by media type, and how the types are mixed.

    Attributes:
      media: media type (`image`, `video`, `audio`, `audio_video`, `text`) to its data.
      mode: `alternate`: every step has batches of one media type, the same on all hosts, each type
        with shapes of its own; `padded`: every batch has rows of all types, in one shape.
      weights: how often each type is shown, by steps (`alternate`) or rows (`padded`); empty: an
        epoch shows every list once, as the original does.
      batch_sizes: rows of a batch of each type; types that are not named take the global batch
        (`alternate`) or what `weights` say (`padded`, where they add up to the global batch).
    """

    media: dict[str, DataConfig]
    mode: str = "alternate"
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    batch_sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"mode {self.mode!r} is not known{nearest(self.mode, _MODES)}")
        if not self.media:
            raise ConfigError(f"media is empty: name data for at least one of {', '.join(MEDIA)}")
        for name, data in self.media.items():
            if name not in MEDIA:
                raise ConfigError(f"media.{name} is no media type{nearest(name, MEDIA)}")
            if data.media != name:
                raise ConfigError(
                    f"media.{name}.media is {data.media!r}; it must be {name!r} like its key"
                )
            if data.eval:
                raise ConfigError(f"media.{name}.eval: evaluation data are not mixed")
        for field in ("weights", "batch_sizes"):
            for name in getattr(self, field):
                if name not in self.media:
                    raise ConfigError(f"{field}.{name} is not in media{nearest(name, self.media)}")
        if self.weights and set(self.weights) != set(self.media):
            missing = sorted(set(self.media) - set(self.weights))
            raise ConfigError(f"weights lacks {', '.join(missing)}: give one for each media type")
        for name, weight in self.weights.items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"weights.{name} must be above 0, is {weight}")
        for name, size in self.batch_sizes.items():
            if size < 1:
                raise ConfigError(f"batch_sizes.{name} must be at least 1, is {size}")


class Schedule:
    """Which media type a step has, and which batch of that type's own stream.

    An epoch has a fixed number of batches of each type, shuffled by (seed, epoch).
    """

    def __init__(self, counts: Mapping[str, int], seed: int) -> None:
        """Takes the batches of an epoch by media type."""
        self.names = tuple(sorted(counts))
        self.counts = {name: counts[name] for name in self.names}
        self.epoch_steps = sum(counts.values())
        self._seed = seed
        self._known: tuple[int, np.ndarray, np.ndarray] | None = None

    def at(self, step: int) -> tuple[str, int]:
        """(media type, number of its batch) of a step."""
        epoch, place = divmod(step, self.epoch_steps)
        order, earlier = self._epoch(epoch)
        name = self.names[order[place]]
        return name, epoch * self.counts[name] + int(earlier[place])

    def position(self, step: int) -> dict[str, int]:
        """Batches of each type in the steps before `step`."""
        epoch, place = divmod(step, self.epoch_steps)
        order, _ = self._epoch(epoch)
        return {
            name: epoch * self.counts[name] + int(np.count_nonzero(order[:place] == i))
            for i, name in enumerate(self.names)
        }

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Media types of an epoch's steps, and how many of the same type came before each."""
        if self._known is None or self._known[0] != epoch:
            order = np.repeat(np.arange(len(self.names)), list(self.counts.values()))
            seeds = np.random.SeedSequence(self._seed, spawn_key=(3, epoch))
            np.random.default_rng(seeds).shuffle(order)
            earlier = np.empty_like(order)
            for i in range(len(self.names)):
                places = np.flatnonzero(order == i)
                earlier[places] = np.arange(len(places))
            self._known = epoch, order, earlier
        return self._known[1], self._known[2]


def open_mix(config: MixConfig) -> dict[str, ClipSource]:
    """Opens the lists of every media type, in the order of their names."""
    return {name: open_data(config.media[name]) for name in sorted(config.media)}


def schedule(
    config: MixConfig, sources: Mapping[str, ClipSource], *, seed: int, global_batch: int
) -> Schedule:
    """The schedule of mode `alternate`.

    An epoch shows every list once (each as many batches as it fills, at least one), or has as many
    steps as that, shared out by the weights.

    Args:
      config: what is mixed.
      sources: the clips by media type, of `open_mix`.
      seed: the run's.
      global_batch: rows of a batch of types that `batch_sizes` does not name.
    """
    counts = {}
    for name, source in sources.items():
        data = config.media[name]
        rows = len(pipeline.make_order(data, source, seed))
        counts[name] = max(rows // config.batch_sizes.get(name, global_batch), 1)
    if config.weights:
        counts = share_out(sum(counts.values()), config.weights)
    return Schedule(counts, seed)


def share_out(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to the weights, each at least 1, that add up to `total`."""
    names = sorted(weights)
    total = max(total, len(names))
    spare = total - len(names)  # after one for each
    ideal = np.array([weights[name] for name in names], np.float64)
    ideal = np.maximum(ideal / ideal.sum() * total - 1, 0)
    ideal *= spare / ideal.sum() if ideal.sum() else 0
    counts = np.floor(ideal + 1e-9).astype(np.int64)
    for at in np.argsort(counts - ideal, kind="stable")[: spare - int(counts.sum())]:
        counts[at] += 1
    return {name: int(n) + 1 for name, n in zip(names, counts, strict=True)}


def media_seed(seed: int, name: str) -> int:
    """The seed of one media type's order and draws; it does not depend on the other types."""
    key = (4, zlib.crc32(name.encode()))
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


class MixedLoader(Closing, Iterator[dict[str, Any]]):
    """Batches of all media types; also a context manager, as worker processes need closing.

    Attributes:
      sources: the clips by media type; `sources[batch["media"]].clips[i]` is the record of `index`
        i. In mode `padded` indices count through all types in the order of their names.
      step: number of the next batch.
      epoch_steps: steps that show every list once (or as the weights say).
    """

    def __init__(
        self,
        sources: Mapping[str, ClipSource],
        loaders: Mapping[str, Loader],
        turns: Callable[[int], str],
        step: int,
        epoch_steps: int,
    ) -> None:
        """Made by `make_mixed_loader`."""
        self.sources = dict(sources)
        self.step, self.epoch_steps = step, epoch_steps
        self._loaders, self._turns = dict(loaders), turns

    def __next__(self) -> dict[str, Any]:
        name = self._turns(self.step)
        try:
            batch: dict[str, Any] = next(self._loaders[name])
        except BaseException:  # the other types' workers must not outlive the run
            self.close()
            raise
        self.step += 1
        return batch | {"media": name}

    @property
    def bad_sounds(self) -> int:
        """Rows so far whose pictures are good and whose sound cannot be decoded."""
        return sum(loader.bad_sounds for loader in self._loaders.values())

    @property
    def bad_rows(self) -> int:
        """Rows so far whose first choice did not decode."""
        return sum(loader.monitor.bad_rows for loader in self._loaders.values())

    def close(self) -> None:
        """Ends the worker processes and threads; no batch comes after it."""
        for loader in self._loaders.values():
            loader.close()


def make_mixed_loader(
    config: MixConfig,
    *,
    seed: int,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    sources: Mapping[str, ClipSource] | None = None,
) -> MixedLoader:
    """Builds the endless loader of one process.

    Args:
      config: what to load and how it is mixed.
      seed: of the orders and of every draw, from 0 on.
      global_batch: B, rows of a batch over all processes.
      process_index: p.
      process_count: P, which must divide every batch size.
      start_step: number of the first batch.
      sources: the clips, if `open_mix` has opened them already.

    Returns:
      An iterator of batches as of `pipeline.make_loader`, each with the key `media`: the name of
      its media type, or `mixed` in mode `padded` (see `padding.PaddedRows` for those batches).

    Raises:
      ConfigError: the numbers or the media types do not fit each other.
      DataError: a list cannot be used; also later, while iterating.
    """
    sources = open_mix(config) if sources is None else sources
    processes = {"process_index": process_index, "process_count": process_count}
    if config.mode == "padded":
        loader, epoch_steps = padding.make_loader(
            config,
            sources,
            seed=seed,
            seeds={name: media_seed(seed, name) for name in sources},
            global_batch=global_batch,
            start_step=start_step,
            **processes,
        )
        return MixedLoader(sources, {MIXED: loader}, lambda step: MIXED, start_step, epoch_steps)
    turns = schedule(config, sources, seed=seed, global_batch=global_batch)
    loaders = {
        name: pipeline.make_loader(
            config.media[name],
            seed=media_seed(seed, name),
            global_batch=config.batch_sizes.get(name, global_batch),
            start_step=at,
            source=sources[name],
            **processes,
        )
        for name, at in turns.position(start_step).items()
    }
    return MixedLoader(
        sources, loaders, lambda step: turns.at(step)[0], start_step, turns.epoch_steps
    )
