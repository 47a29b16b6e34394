"""How fast a machine feeds clips, what the time goes into, and how many cores a target needs."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from iv2_jax.data import augment, pipeline, rows
from iv2_jax.data.decode import DecodeError
from iv2_jax.data.sources import ClipSource

_WARM_BATCHES = 2  # worker start-up, file cache


@dataclasses.dataclass(frozen=True)
class Split:
    """Median milliseconds of one clip in one process, by step; and how many clips were measured."""

    open_ms: float
    decode_ms: float
    transform_ms: float
    clips: int

    @property
    def clips_per_second(self) -> float:
        """What these times allow a core."""
        return 1000.0 / (self.open_ms + self.decode_ms + self.transform_ms)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Clips a second with so many worker processes."""

    workers: int
    clips_per_second: float

    @property
    def per_worker(self) -> float:
        """Clips a second for each worker."""
        return self.clips_per_second / max(self.workers, 1)


def measure_split(source: ClipSource, config: pipeline.DataConfig, clips: int) -> Split:
    """Times opening (and listing packets), decoding and augmenting, one clip after another.

    Args:
      source: the clips.
      config: how they are loaded.
      clips: how many to time, from the first on, repeating a short list.
    """
    times: list[tuple[float, float, float]] = []
    for i in range(clips):
        rng = rows.row_rng(0, i)
        begin = time.perf_counter()
        try:
            clip = source.open(i % len(source))
        except DecodeError:
            continue
        try:
            available = len(clip)
            opened = time.perf_counter()
            train, evaluate = rows.sampling_rule(clip, config)
            if config.eval:
                chosen = evaluate(available, config.num_frames, 0, 1)
            else:
                chosen = train(available, config.num_frames, rng)
            frames = clip.read(chosen)
            decoded = time.perf_counter()
            _transform(frames, config, rng)
            times.append((opened - begin, decoded - opened, time.perf_counter() - decoded))
        except DecodeError:
            continue
        finally:
            clip.close()
    if not times:
        raise DecodeError(source.name(0), f"none of the first {clips} clips decodes")
    steps = [1e3 * statistics.median(step) for step in zip(*times, strict=True)]
    return Split(*steps, clips=len(times))


def _transform(
    frames: np.ndarray, config: pipeline.DataConfig, rng: np.random.Generator
) -> np.ndarray:
    """What the loader does to decoded frames."""
    if config.augment == "multiscale_crop":
        return augment.multiscale_crop(frames, config.size, rng, flip=config.flip)
    return augment.eval_views(frames, config.size, short=config.short_side, num_crops=config.crops)


def measure_throughput(
    source: ClipSource,
    config: pipeline.DataConfig,
    workers: Sequence[int],
    *,
    batch: int,
    seconds: float,
) -> Iterator[Throughput]:
    """Runs the real loader with each number of workers.

    Args:
      source: the clips.
      config: how they are loaded; its `num_workers` is replaced.
      workers: numbers of worker processes; 0 is one thread of this process.
      batch: rows of a batch.
      seconds: how long to measure each, after a warm-up.
    """
    for count in workers:
        chosen = dataclasses.replace(
            config, num_workers=count, threads=1, shuffle=True, eval=False, max_bad_share=1.0
        )
        with pipeline.make_loader(chosen, seed=0, global_batch=batch, source=source) as loader:
            for _ in range(_WARM_BATCHES * max(count, 1)):
                next(loader)
            read, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < seconds:
                next(loader)
                read += batch
            yield Throughput(count, read / (time.perf_counter() - begin))


def cores_for(target: float, measured: Sequence[Throughput]) -> int:
    """Cores for `target` clips a second, at the lowest rate a worker had (all cores busy)."""
    rate = min(m.per_worker for m in measured)
    return math.ceil(target / rate)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (math.nan,)
    return {"cores": os.cpu_count() or 1, "load_before": load[0]}
