"""The loader: batches of clips as NumPy arrays, for any number of hosts and workers (Grain).

A batch is a dict of

* `video` uint8 (b, T, S, S, 3) RGB, or (b, V, T, S, S, 3) with V > 1 views;
* `index` int32 (b,) position of the clip in the split's list (-1 for padding);
* `replaced` int32 (b,) how many undecodable clips were passed over for the row, normally 0;
* `valid` bool (b,), evaluation only: False for padding and for clips that do not decode;
* `visible` int32 (b, N_visible), with a tube or random mask: token 0 is the class token;
* with `targets`, the stored arrays of each clip by their names.

Batch k holds rows [k*B, (k+1)*B) of an endless stream that goes through the clips epoch by epoch,
each epoch in its own order; process p takes rows [p*B/P, (p+1)*B/P) of each batch. Nothing else is
remembered between steps: resuming at step k means `start_step=k`, on any number of hosts.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import sys
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from iv2_jax.data import sampling
from iv2_jax.data.badclips import BadClipMonitor
from iv2_jax.data.rows import Order, Rows
from iv2_jax.data.sources import ClipSource, open_source
from iv2_jax.data.targets import Targets
from iv2_jax.errors import ConfigError, DataError, nearest

_ENDLESS_STEPS = 1 << 40
_AUGMENTS = ("multiscale_crop", "center")
_MASKS = ("none", "tube", "random")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to load and how.

    Attributes:
      source: manifest of any format, or folder of a packed data set.
      format: manifest format, see `manifest.FORMATS`.
      prefix: folder or URL that relative paths of the manifest are joined to.
      separator: column separator of text lists; None tries space, comma and tab.
      split: only the clips of this split.
      num_frames: T, frames of a view.
      sampling: rule that picks them, see `sampling.RULES`.
      stride: distance of the frames for the rule `dense`.
      released_minus_one: the released pretraining loader's frames, each one too early.
      size: S, side of the pictures.
      short_side: evaluation: short side before the centre crop; None = `size`.
      augment: `multiscale_crop` (stage-1 training) or `center`.
      flip: mirror half of the training clips.
      views: temporal views of a clip; in training, independent draws.
      crops: evaluation: crops along the longer side for each temporal view.
      mask: `none`, `tube` or `random`: adds `visible`.
      mask_ratio: share of tokens hidden.
      mask_grid: (T', H', W') of the tokens.
      shuffle: a new order every epoch.
      fixed_view: training: every clip always in its evaluation view, so that what was computed of
        it once stays true.
      targets: folder of arrays stored by clip, see `data.targets`.
      eval: one pass in the list's order, deterministic views, last batch padded.
      num_workers: worker processes; 0 decodes in threads of this process.
      threads: those threads; 0 decodes in the caller's thread.
      prefetch: batches kept ready (by each worker).
      max_bad_share: share of rows that may be replaced before a `DataError`.
      max_tries: undecodable clips in a row before a `DataError`.
      bad_clip_log: JSONL file on a local disk that names bad clips; empty = stderr only. With
        several processes their number goes before the extension.
    """

    source: str
    format: str = "auto"
    prefix: str = ""
    separator: str | None = None
    split: str | None = None
    num_frames: int = 16
    sampling: str = "pretrain"
    stride: int = 4
    released_minus_one: bool = False
    size: int = 224
    short_side: int | None = None
    augment: str = "multiscale_crop"
    flip: bool = True
    views: int = 1
    crops: int = 1
    mask: str = "none"
    mask_ratio: float = 0.8
    mask_grid: tuple[int, int, int] | None = None
    shuffle: bool = True
    fixed_view: bool = False
    targets: str = ""
    eval: bool = False
    num_workers: int = 0
    threads: int = 2
    prefetch: int = 2
    max_bad_share: float = 0.1
    max_tries: int = 16
    bad_clip_log: str = ""

    def __post_init__(self) -> None:
        for name in ("num_frames", "stride", "size", "views", "crops", "prefetch", "max_tries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, is {getattr(self, name)}")
        for name in ("num_workers", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name} must not be negative, is {getattr(self, name)}")
        for name, known in (("augment", _AUGMENTS), ("mask", _MASKS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"data.{name} {value!r} is not known{nearest(value, known)}")
        for name in ("max_bad_share", "mask_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} must be from 0 to 1, is {getattr(self, name)}")
        sampling.rule(self.sampling)
        if self.mask != "none" and self.mask_grid is None:
            raise ConfigError(f"data.mask {self.mask!r} needs data.mask_grid=(T', H', W')")
        if self.eval and self.augment != "center":
            raise ConfigError(f"data.eval needs data.augment='center', is {self.augment!r}")
        short_side = self.size if self.short_side is None else self.short_side
        if self.fixed_view and (self.augment != "center" or self.views > 1):
            raise ConfigError("data.fixed_view needs data.augment='center' and data.views=1")
        if self.targets and not (self.fixed_view or self.eval):
            raise ConfigError("data.targets needs data.fixed_view: they were made of one view")
        if self.crops > 1 and (self.augment != "center" or short_side != self.size):
            raise ConfigError("data.crops > 1 needs data.augment='center' and no data.short_side")
        if short_side < self.size:
            raise ConfigError(
                f"data.short_side {short_side} must be at least data.size {self.size}"
            )

    @property
    def num_views(self) -> int:
        """V: temporal views times crops."""
        return self.views * self.crops


class Loader(Iterator[dict[str, np.ndarray]]):
    """Iterator over batches; also a context manager, as worker processes need closing.

    Attributes:
      source: the clips; `source.clips[i]` is the record of `index` i.
      monitor: counts of replaced rows.
      step: number of the next batch.
      last_step: number after the last batch, None for an endless stream.
    """

    def __init__(
        self,
        source: ClipSource,
        rows: Rows,
        batches: Iterator[dict[str, Any]],
        monitor: BadClipMonitor,
        *,
        local_batch: int,
        first_step: int,
        last_step: int | None,
    ) -> None:
        """Made by `make_loader`."""
        self.source = source
        self.monitor = monitor
        self.step = first_step
        self.last_step = last_step
        self._first_step = first_step
        self._local_batch = local_batch
        self._rows = rows
        self._open = [batches]  # emptied when closed
        # Grain's iterators must end before the interpreter does, closed by the caller or not.
        self._finalizer = weakref.finalize(self, _close, self._open)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._open:
            raise StopIteration
        try:
            batch = next(self._open[0])
        except RuntimeError as e:
            self.close()
            raise _explain(e) from e
        except BaseException:  # the end of the data, too
            self.close()
            raise
        first = (self.step - self._first_step) * self._local_batch
        rows = [self._rows.row_of(first + i) for i in range(self._local_batch)]
        self.monitor.update(np.asarray(batch["replaced"]), rows)
        self.step += 1
        # Out of shared memory: a batch that the caller keeps must not hold a segment of it.
        return {name: np.array(value) for name, value in batch.items()}

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes and threads; no batch comes after it."""
        self._finalizer()


def _close(batches: list[Iterator[dict[str, Any]]]) -> None:
    """Closes a Grain iterator and frees the shared memory its reference cycles hold."""
    while batches:
        close = getattr(batches.pop(), "close", None)
        if close is not None:
            close()
            del close
            gc.collect()


def steps_in_pass(num_clips: int, global_batch: int) -> int:
    """Batches of one evaluation pass, the last one padded; the same on every host."""
    return -(-num_clips // global_batch)


def make_loader(
    config: DataConfig,
    *,
    seed: int,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    num_steps: int | None = None,
    source: ClipSource | None = None,
) -> Loader:
    """Builds the loader of one process.

    Args:
      config: what to load.
      seed: of the order and of every draw, from 0 on.
      global_batch: B, rows of a batch over all processes.
      process_index: p.
      process_count: P, which must divide B.
      start_step: number of the first batch.
      num_steps: batches to yield; None = endless in training, the rest of the pass in evaluation.
      source: the clips, if they are already open; `config.source` is opened otherwise.

    Returns:
      An iterator of batches (see the module's docstring) of B / P rows.

    Raises:
      ConfigError: the numbers do not fit each other.
      DataError: the source cannot be used; also later, while iterating, when too many clips do not
        decode or a worker process dies.
    """
    import grain

    _check_rows(seed, global_batch, process_index, process_count, start_step, num_steps)
    if source is None:
        source = open_source(
            config.source,
            format=config.format,
            prefix=config.prefix,
            split=config.split,
            separator=config.separator,
        )
    if process_count > 1 and config.bad_clip_log:
        root, extension = os.path.splitext(config.bad_clip_log)
        config = dataclasses.replace(config, bad_clip_log=f"{root}.{process_index}{extension}")
    steps = num_steps
    if config.eval:
        left = max(steps_in_pass(len(source), global_batch) - start_step, 0)
        steps = left if steps is None else min(steps, left)
    targets = records = None
    if config.targets:
        targets = Targets(config.targets, "eval" if config.eval else "train")
        records = targets.records([clip.id for clip in source.clips])
    order = Order(len(source), seed, shuffle=config.shuffle and not config.eval)
    rows = Rows(
        source,
        config,
        order,
        seed=seed,
        first_step=start_step,
        num_steps=_ENDLESS_STEPS if steps is None else steps,
        global_batch=global_batch,
        process_index=process_index,
        process_count=process_count,
        targets=targets,
        records=records,
    )
    local_batch = global_batch // process_count
    dataset = grain.MapDataset.source(rows).batch(local_batch, drop_remainder=True)
    if config.num_workers:
        _check_shared_memory(config, local_batch, targets.nbytes if targets else 0)
        _settle_flags()
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.num_workers, per_worker_buffer_size=config.prefetch
            )
        )
    else:
        buffer = max(config.prefetch, config.threads) if config.threads else 0
        dataset = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=buffer)
        )

    def bad_clips(row: int, replaced: int) -> list[str]:
        if config.eval:
            return [source.name(row)]
        return [source.name(order.clip(row, i)) for i in range(replaced)]

    return Loader(
        source,
        rows,
        iter(dataset) if steps != 0 else iter(()),
        BadClipMonitor(config.max_bad_share, bad_clips),
        local_batch=local_batch,
        first_step=start_step,
        last_step=None if steps is None else start_step + steps,
    )


def _check_rows(
    seed: int,
    global_batch: int,
    process_index: int,
    process_count: int,
    start_step: int,
    num_steps: int | None,
) -> None:
    """Refuses numbers that do not fit each other."""
    if seed < 0:
        raise ConfigError(f"seed must be from 0 on, is {seed}")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index {process_index} is not one of {process_count} processes")
    if global_batch < 1 or global_batch % process_count:
        raise ConfigError(
            f"global_batch {global_batch} must be a positive multiple of the {process_count} "
            "processes"
        )
    if start_step < 0 or (num_steps is not None and num_steps < 0):
        raise ConfigError(f"start_step {start_step} and num_steps {num_steps} must be from 0 on")


def _settle_flags() -> None:
    """Grain's worker processes read absl flags, which only `absl.app.run` programs have parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _check_shared_memory(config: DataConfig, local_batch: int, extra: int) -> None:
    """Refuses to start workers that would run out of the memory they hand batches over in."""
    folder = "/dev/shm"
    if not sys.platform.startswith("linux") or not os.path.isdir(folder):
        return
    clip = config.num_views * config.num_frames * config.size**2 * 3 + extra
    batch = local_batch * clip
    needed = batch * (config.prefetch + 2) * config.num_workers
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{config.num_workers} workers with {config.prefetch} batches of {batch >> 20} MiB "
            f"each need {needed >> 20} MiB in {folder}, {free >> 20} MiB are free; lower "
            "data.num_workers or data.prefetch, or give the container more (docker --shm-size)"
        )


def _explain(error: RuntimeError) -> Exception:
    """What a dead worker usually means; other errors as they are."""
    if "Worker process was terminated unexpectedly" not in str(error):
        return error
    return DataError(
        f"a loader worker died: {error} Exit code -9 is usually the kernel ending it for want of "
        "memory, -7 a full /dev/shm (lower data.num_workers, data.prefetch or the batch); exit "
        "code 1 at the start is often a script without `if __name__ == '__main__':`, which worker "
        "processes import"
    )
