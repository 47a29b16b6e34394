"""The loader: batches of clips as NumPy arrays, for any number of hosts and workers (Grain).

A batch is a dict of

* `video` uint8 (b, T, S, S, 3) RGB, or (b, V, T, S, S, 3) with V > 1 views;
* `index` int32 (b,) position of the clip in the split's list (-1 for padding);
* `replaced` int32 (b,) how many undecodable clips were passed over for the row, normally 0;
* `valid` bool (b,), evaluation only: False for padding and for clips that do not decode;
* `visible` int32 (b, N_visible), with a tube or random mask: token 0 is the class token;
* with `targets`, the stored arrays of each clip by their names;
* with `text`, `text_<caption>` int32 (b, L) for each caption, padding where a clip has none, and
  `match_id` int32 (b,): rows of equal id are positives of each other;
* with sound, `fbank` float32 (b, frames, mels) and `has_audio` bool (b,).

The media types `audio` and `text` have no `video`; for `image`, T is 1.

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
from typing import Any

import numpy as np

from iv2_jax.data.badclips import BadClipMonitor
from iv2_jax.data.closing import Closing
from iv2_jax.data.corpora import match_ids, open_data, spread_of
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.modalities import WITH_PICTURES
from iv2_jax.data.rows import Order, Rows
from iv2_jax.data.sources import ClipSource
from iv2_jax.data.targets import Targets
from iv2_jax.errors import ConfigError, DataError

ENDLESS_STEPS = 1 << 40


class Ahead(Closing, Iterator[dict[str, np.ndarray]]):
    """Batches that a Grain iterator reads ahead; closed at the end, at an error or by hand."""

    def __init__(self, batches: Iterator[dict[str, Any]]) -> None:
        """Takes the iterator, which nobody else may use."""
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
        # Out of shared memory: a batch that the caller keeps must not hold a segment of it.
        return {name: np.array(value) for name, value in batch.items()}

    def close(self) -> None:
        """Ends the worker processes and threads; no batch comes after it."""
        self._finalizer()


class Loader(Closing, Iterator[dict[str, np.ndarray]]):
    """Iterator over batches; also a context manager, as worker processes need closing.

    Attributes:
      source: the clips; `source.clips[i]` is the record of `index` i.
      monitor: counts of replaced rows.
      step: number of the next batch.
      last_step: number after the last batch, None for an endless stream.
      bad_sounds: rows so far whose pictures are good and whose sound cannot be decoded.
    """

    def __init__(
        self,
        source: ClipSource,
        rows: Any,
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
        self.bad_sounds = 0
        self.last_step = last_step
        self._first_step = first_step
        self._local_batch = local_batch
        self._rows = rows
        self._batches = Ahead(batches)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        first = (self.step - self._first_step) * self._local_batch
        rows = [self._rows.row_of(first + i) for i in range(self._local_batch)]
        self.monitor.update(np.asarray(batch["replaced"]), rows)
        self.step += 1
        self.bad_sounds += int(np.sum(batch.pop("bad_sound", 0)))
        return batch

    def close(self) -> None:
        """Ends the worker processes and threads; no batch comes after it."""
        self._batches.close()


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
    check_rows(seed, global_batch, process_index, process_count, start_step, num_steps)
    if source is None:
        source = open_data(config)
    config = own_log(config, process_index, process_count)
    steps = num_steps
    if config.eval:
        left = max(steps_in_pass(len(source), global_batch) - start_step, 0)
        steps = left if steps is None else min(steps, left)
    order = make_order(config, source, seed)
    rows = make_rows(
        config,
        source,
        order,
        seed=seed,
        first_step=start_step,
        num_steps=ENDLESS_STEPS if steps is None else steps,
        global_batch=global_batch,
        process_index=process_index,
        process_count=process_count,
    )
    local_batch = global_batch // process_count

    def bad_clips(row: int, replaced: int) -> list[str]:
        if config.eval:
            return [source.name(row)]
        return [source.name(order.clip(row, i)) for i in range(replaced)]

    return Loader(
        source,
        rows,
        batches(rows, config, local_batch) if steps != 0 else iter(()),
        BadClipMonitor(config.max_bad_share, bad_clips),
        local_batch=local_batch,
        first_step=start_step,
        last_step=None if steps is None else start_step + steps,
    )


def own_log(config: DataConfig, process_index: int, process_count: int) -> DataConfig:
    """The config with a log of bad clips that is this process's alone."""
    log = own_path(config.bad_clip_log, process_index, process_count)
    return dataclasses.replace(config, bad_clip_log=log)


def own_path(path: str, process_index: int, process_count: int) -> str:
    """The path with the process's number before its extension, where there are several."""
    if process_count == 1 or not path:
        return path
    root, extension = os.path.splitext(path)
    return f"{root}.{process_index}{extension}"


def make_order(config: DataConfig, source: ClipSource, seed: int) -> Order:
    """The order in which a run sees its clips."""
    spread = None if config.eval else spread_of(source)
    return Order(len(source), seed, shuffle=config.shuffle and not config.eval, spread=spread)


def make_rows(config: DataConfig, source: ClipSource, order: Order, **numbers: int) -> Rows:
    """The rows of one process; `numbers` as in `Rows`."""
    targets = records = texts = match = None
    if config.targets:
        targets = Targets(config.targets, "eval" if config.eval else "train")
        records = targets.records([clip.id for clip in source.clips])
    if config.text is not None:
        from iv2_jax.data.row_texts import RowTexts

        texts = RowTexts(source, config.text)
        match = match_ids(source, config)
    return Rows(
        source,
        config,
        order,
        **numbers,
        targets=targets,
        records=records,
        texts=texts,
        match=match,
    )


def batches(rows: Any, config: DataConfig, local_batch: int) -> Iterator[dict[str, Any]]:
    """Batches of a data source of rows, made by threads or worker processes."""
    import grain

    dataset = grain.MapDataset.source(rows).batch(local_batch, drop_remainder=True)
    pictures = config.num_views * config.frames * config.size**2 * 3
    clip = rows.side_bytes + (pictures if config.media in WITH_PICTURES else 0)
    return read_ahead(dataset, config, local_batch * clip)


def read_ahead(dataset: Any, config: Any, batch_bytes: int) -> Iterator[dict[str, Any]]:
    """Goes through a `grain.MapDataset` of batches with threads or worker processes.

    Args:
      dataset: the batches.
      config: has `num_workers`, `threads` and `prefetch`, see `DataConfig`.
      batch_bytes: size of a batch, which worker processes hand over in shared memory.

    Raises:
      DataError: there is less shared memory than the workers would use.
    """
    import grain

    if config.num_workers:
        _check_shared_memory(config, batch_bytes)
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
    return iter(dataset)


def check_rows(
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


def _check_shared_memory(config: Any, batch: int) -> None:
    """Refuses to start workers that would run out of the memory they hand batches over in."""
    folder = "/dev/shm"
    if not sys.platform.startswith("linux") or not os.path.isdir(folder):
        return
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
