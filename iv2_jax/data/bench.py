"""How fast a machine feeds clips, what the time goes into, and how many cores a target needs."""

from __future__ import annotations

import collections
import dataclasses
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from iv2_jax.data import augment, pipeline, rows
from iv2_jax.data.decode import DecodeError, VideoReader
from iv2_jax.data.sources import ClipSource
from iv2_jax.errors import DataError

_WARM_BATCHES = 2  # worker start-up, file cache


@dataclasses.dataclass(frozen=True)
class Split:
    """Median milliseconds of one clip in one process, by step; and how many clips were measured.

    `reads` counts how the frames of videos were found, see `decode.ReadCounts`; empty where none
    was a video.
    """

    open_ms: float
    decode_ms: float
    transform_ms: float
    clips: int
    reads: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def clips_per_second(self) -> float:
        """What these times allow a core."""
        return 1000.0 / (self.open_ms + self.decode_ms + self.transform_ms)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Clips a second with so many worker processes, and the most MiB that one of them takes."""

    workers: int
    clips_per_second: float
    worker_mib: float = math.nan

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
    reads: collections.Counter[str] = collections.Counter()
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
        if isinstance(clip, VideoReader):
            reads.update(dataclasses.asdict(clip.counts))
    if not times:
        raise DecodeError(source.name(0), f"none of the first {clips} clips decodes")
    steps = [1e3 * statistics.median(step) for step in zip(*times, strict=True)]
    return Split(*steps, clips=len(times), reads=dict(reads))


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
            rate = read / (time.perf_counter() - begin)
            yield Throughput(count, rate, _largest_worker())


@dataclasses.dataclass(frozen=True)
class Memory:
    """MiB that a worker process has for itself after so many clips."""

    clips: int
    mib: float


def measure_memory(
    source: ClipSource, config: pipeline.DataConfig, clips: int, *, batch: int, points: int = 20
) -> Iterator[Memory]:
    """Reads clips in one worker process and looks at its memory now and then.

    Args:
      source: the clips; a short list is gone through again.
      config: how they are loaded.
      clips: how many to read.
      batch: rows of a batch.
      points: how many times to look.

    Raises:
      DataError: this system does not tell a process's memory (it takes Linux's /proc).
    """
    chosen = dataclasses.replace(config, num_workers=1, threads=1, max_bad_share=1.0)
    steps = max(clips // batch, points)
    with pipeline.make_loader(chosen, seed=0, global_batch=batch, source=source) as loader:
        for step in range(1, steps + 1):
            next(loader)
            if step % (steps // points) == 0:
                mib = _largest_worker()
                if math.isnan(mib):
                    raise DataError("memory of a process is read from /proc, which is not here")
                yield Memory(step * batch, mib)


def growth(points: Sequence[Memory]) -> float:
    """MiB from the mean of the second quarter of the points to that of the last one.

    The first quarter is left out: buffers are filled and modules imported there.
    """
    quarter = max(len(points) // 4, 1)
    early = statistics.fmean(p.mib for p in points[quarter : 2 * quarter])
    return statistics.fmean(p.mib for p in points[-quarter:]) - early


def _largest_worker() -> float:
    """`worker_mib` of this process's largest child."""
    children = multiprocessing.active_children()
    return max((worker_mib(child.pid) for child in children), default=math.nan)


def worker_mib(pid: int | None) -> float:
    """MiB of memory of a process that it shares with no other; NaN where /proc does not say."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["RssAnon"].split()[0]) / 1024
    except (OSError, KeyError):
        return math.nan


def cores_for(target: float, measured: Sequence[Throughput]) -> int:
    """Cores for `target` clips a second, at the lowest rate a worker had (all cores busy)."""
    rate = min(m.per_worker for m in measured)
    return math.ceil(target / rate)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (math.nan,)
    return {"cores": os.cpu_count() or 1, "load_before": load[0]}
