"""The loader of instruction tuning: batches of conversations with their pixels, read ahead.

Position in the data is a function of the step alone (`TokenBatches`), so a run resumes at any step
exactly, on any number of processes and workers.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.data.badclips import BadClipMonitor
from iv2_jax.data.closing import Closing
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.decode import DecodeError
from iv2_jax.data.instruct.batches import TokenBatches, Usage
from iv2_jax.data.instruct.conversations import Medium
from iv2_jax.data.instruct.mixes import read_mix
from iv2_jax.data.instruct.pictures import ViewLoader
from iv2_jax.data.instruct.plan import RowConfig, Shape
from iv2_jax.data.instruct.sizes import NumViews, measure, one_view
from iv2_jax.data.instruct.talk import VISUAL, TalkConfig
from iv2_jax.data.pipeline import ENDLESS_STEPS, Ahead, own_path, read_ahead
from iv2_jax.data.sources import open_frames
from iv2_jax.data.tiles import TilingConfig
from iv2_jax.errors import ConfigError

_INTS = 24  # bytes of a position in all arrays
_PROBES = 32  # files that are opened at once to find their size


@dataclasses.dataclass(frozen=True)
class LoadConfig:
    """How conversations are read.

    Attributes:
      num_workers: worker processes; 0 decodes in threads of this process.
      threads: those threads, each with a batch of its own; 0 decodes in the caller's thread.
      prefetch: batches kept ready (by each worker).
      max_bad_share: share of rows with a file that does not decode before a `DataError`.
      bad_clip_log: JSONL file on a local disk that names files that do not decode; empty = stderr
        only. With several processes their number goes before the extension.
      sizes: file (`.npz`) that keeps the lengths of all conversations, and beside it the sizes of
        tiled pictures; empty finds them at every start.
      measure_workers: processes that find the lengths.
      missing: what becomes of conversations about files that are not there: `error` or `skip`.

    Raises:
      ConfigError: a number is out of range.
    """

    num_workers: int = 0
    threads: int = 2
    prefetch: int = 2
    max_bad_share: float = 0.1
    bad_clip_log: str = ""
    sizes: str = ""
    measure_workers: int = 0
    missing: str = "error"

    def __post_init__(self) -> None:
        for name in ("num_workers", "threads", "measure_workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"load.{name} must not be negative, is {getattr(self, name)}")
        if self.prefetch < 1:
            raise ConfigError(f"load.prefetch must be at least 1, is {self.prefetch}")
        if not 0 <= self.max_bad_share <= 1:
            raise ConfigError(f"load.max_bad_share must be from 0 to 1, is {self.max_bad_share}")


class TiledViews:
    """Views of a medium with tiles, by the size of its first frame; can be pickled."""

    def __init__(self, tiling: TilingConfig, frames: Mapping[str, tuple[int, int]]) -> None:
        """Takes (height, width) of files by path; others are opened when asked for."""
        self._tiling, self._frames = tiling, dict(frames)

    def __call__(self, medium: Medium) -> int:
        """Views of a medium; one that does not decode counts as a square of one tile."""
        if self._tiling.fixed_grid is not None:
            return self._tiling.grid(1, 1).num_views
        if medium.path not in self._frames:
            self._frames[medium.path] = frame_size(medium.path)
        height, width = self._frames[medium.path]
        return self._tiling.grid(max(height, 1), max(width, 1)).num_views


def frame_size(path: str) -> tuple[int, int]:
    """(height, width) of a file's first frame in pixels; (0, 0) where it does not decode."""
    try:
        clip = open_frames(path)
        try:
            height, width = clip.read(np.zeros(1, np.int64)).shape[1:3]
        finally:
            clip.close()
    except DecodeError:  # named and counted when it is shown
        return 0, 0
    return int(height), int(width)


def tiled_views(tiling: TilingConfig, media: Sequence[Medium], cache: str = "") -> NumViews:
    """Number of views by medium, all files opened at once, or known from `cache` (JSON)."""
    known: dict[str, tuple[int, int]] = {}
    if cache and os.path.exists(cache):
        known = {k: tuple(v) for k, v in json.loads(Path(cache).read_text("utf-8")).items()}
    paths = list({medium.path: None for medium in media if medium.path not in known})
    if tiling.fixed_grid is None and paths:
        with concurrent.futures.ThreadPoolExecutor(_PROBES) as pool:
            known |= dict(zip(paths, pool.map(frame_size, paths), strict=True))
        if cache:
            part = f"{cache}.{os.getpid()}.part"
            Path(part).write_text(json.dumps(known), encoding="utf-8")
            os.replace(part, cache)
    return TiledViews(tiling, known)


def open_talks(
    talk: TalkConfig,
    mix: str,
    rows: RowConfig,
    load: LoadConfig,
    *,
    seed: int,
    train: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> TokenBatches:
    """Reads a mix and plans its batches.

    Args:
      talk: tokenizers, template, views.
      mix: a mix (`.yaml`) or a file of conversations.
      rows: shapes of rows and batches.
      load: caches, workers.
      seed: of the order and of every draw.
      train: with the draws of training; otherwise every conversation once, in a fixed order.
      process_index: p.
      process_count: P.

    Raises:
      ConfigError: the settings do not fit each other.
      DataError: a file cannot be used; names it.
    """
    talks = [talk.instructed(c) for c in read_mix(mix, seed=seed, missing=load.missing)]
    if not train:
        rows = dataclasses.replace(rows, shuffle=False)
        sequence = dataclasses.replace(talk.sequence, shuffle_turns=False)
        talk = dataclasses.replace(talk, sequence=sequence)
    builder = talk.make_builder()
    cache = load.sizes if train else ""
    num_views: NumViews = one_view
    if talk.tiling is not None:
        media = [medium for conversation in talks for medium in conversation.media]
        num_views = tiled_views(talk.tiling, media, f"{cache}.frames.json" if cache else "")
    return TokenBatches(
        talks,
        builder,
        rows,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        num_views=num_views,
        sizes=measure(talks, builder, num_views, workers=load.measure_workers, cache=cache),
        bridge=talk.make_bridge(),
    )


def shape_name(shape: Shape) -> str:
    """Name of a kind of batch: `video-256`, or `video-1024x7` with up to seven views a row."""
    return f"{shape.kind}-{shape.length}" + (f"x{shape.views}" if shape.views > 1 else "")


class Steps:
    """The batches of a process by step, with pixels, as a data source for Grain."""

    def __init__(
        self, tokens: TokenBatches, views: ViewLoader | None, first_step: int, num_steps: int
    ) -> None:
        """Takes the token sequences, what adds pixels (None: nothing), and the steps."""
        self._tokens, self._views = tokens, views
        self._first, self._steps = first_step, num_steps
        self._names = [shape_name(shape) for shape in tokens.plan.shapes]

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Arrays alone; `shape` is the number of the batch's shape in the plan."""
        step = self._first + item
        batch = self._tokens[step]
        if self._views is not None:
            batch = self._views.add(batch)
        shape = self._tokens.plan.batch(step).shape
        rows = len(batch["tokens"])
        unread = batch.pop("unread", np.zeros(rows, np.int32))
        del batch["kind"]
        numbers = {"epoch": batch["epoch"], "shape": self._names.index(shape_name(shape))}
        return batch | {name: np.int32(n) for name, n in numbers.items()} | {"unread": unread}


class TalkLoader(Closing, Iterator[dict[str, Any]]):
    """Iterator over batches; also a context manager, as worker processes need closing.

    A batch is as of `TokenBatches`, with `video` and `unread` of `ViewLoader`, but `media` is the
    name of the kind of batch (`shape_name`), and `clips` what `media` is there.

    Attributes:
      step: number of the next batch.
      tokens: the batches without pixels; `tokens.plan.epoch_steps` show every conversation once.
      usage: what the batches so far were filled with.
      unread: conversations so far that left the loss because a file did not decode.
    """

    def __init__(
        self,
        tokens: TokenBatches,
        views: ViewLoader | None,
        load: LoadConfig,
        *,
        batch_bytes: int,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> None:
        """Begins to read ahead; `batch_bytes` is the size of the largest batch."""
        import grain

        self.step, self.tokens, self.unread, self.usage = start_step, tokens, 0, Usage()
        self._names = [shape_name(shape) for shape in tokens.plan.shapes]
        steps = ENDLESS_STEPS if num_steps is None else num_steps
        source = Steps(tokens, views, start_step, steps)
        dataset = grain.MapDataset.source(source)
        self._batches = Ahead(read_ahead(dataset, load, batch_bytes))
        self._monitor = BadClipMonitor(load.max_bad_share)

    def __next__(self) -> dict[str, Any]:
        batch: dict[str, Any] = next(self._batches)
        name = self._names[int(batch.pop("shape"))]
        self._monitor.update(batch["unread"], range(len(batch["unread"])))
        self.unread += int(batch["unread"].sum())
        self.usage.add(batch)
        self.step += 1
        clips = {"clips": batch["media"]} if "media" in batch else {}
        return batch | clips | {"media": name}

    def close(self) -> None:
        """Ends the worker processes and threads; no batch comes after it."""
        self._batches.close()


def make_talk_loader(
    tokens: TokenBatches,
    talk: TalkConfig,
    load: LoadConfig,
    *,
    seed: int,
    train: bool = True,
    start_step: int = 0,
    pixels: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> TalkLoader:
    """Builds the loader of one process.

    Args:
      tokens: of `open_talks`.
      talk: how views are made.
      load: workers and logs.
      seed: of every draw.
      train: endless, with the draws of training; otherwise every conversation once.
      start_step: number of the first batch.
      pixels: False leaves the media to somebody else.
      process_index: p.
      process_count: P.
    """
    data: dict[str, DataConfig] = {kind: talk.view_config(kind, train=train) for kind in VISUAL}
    log = own_path(load.bad_clip_log, process_index, process_count)
    views = None
    if pixels:
        views = ViewLoader(tokens.clips, data, seed=seed, tiling=talk.tiling, log=log)
    steps = None if train else max(tokens.plan.epoch_steps - start_step, 0)
    pixel = (1 if talk.tiling is None else 4) * 3 * talk.size**2 if pixels else 0
    frames = {kind: config.frames for kind, config in data.items()} | {"text": 0}
    largest = max(
        shape.rows * (_INTS * shape.length + shape.views * frames[shape.kind] * pixel)
        for shape in tokens.plan.shapes
    )
    return TalkLoader(
        tokens,
        views,
        load,
        batch_bytes=largest // process_count,
        start_step=start_step,
        num_steps=steps,
    )
