"""What a run does when things go wrong: asked to stop, hung, or a loss that is not finite."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from iv2_jax import storage
from iv2_jax.errors import CheckpointError
from iv2_jax.parallel import distributed

logger = logging.getLogger(__name__)

BAD_STEPS = "bad_steps.jsonl"


class StopFlag:
    """Whether to stop after this step.

    Attributes:
      requested: A signal has reached this process.
      agreed: It has reached one of the processes, and all know of it since the same step.
    """

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False


@contextlib.contextmanager
def stop_on_signal(told: Callable[[], None]) -> Iterator[StopFlag]:
    """SIGTERM and SIGINT ask for a checkpoint and an orderly end; a second one kills at once.

    Args:
      told: Called at the first of them.
    """
    flag = StopFlag()

    def handler(number: int, frame: Any) -> None:
        del frame
        if flag.requested:
            raise KeyboardInterrupt
        flag.requested = True
        told()
        logger.warning("%s: stopping after this step", signal.Signals(number).name)

    try:
        old = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread (a notebook's worker): signals stay as they are
        old = {}
    try:
        yield flag
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


class Watchdog:
    """Ends a process that hangs: shows where every thread stands, and exits with 75.

    A thread of its own looks; the loop says now and then that it is alive and what comes next.

    Args:
      step_timeout: Seconds without a word from the loop; 0 = any.
      stop_timeout: Seconds from a request to stop to the end of the process; 0 = any.
    """

    def __init__(self, step_timeout: float, stop_timeout: float) -> None:
        self._limit = step_timeout or math.inf
        self._stop_limit = stop_timeout or math.inf
        self._doing, self._last = "starting", time.monotonic()
        self._stop_at = math.inf
        self._paused = False
        self._done = threading.Event()
        shortest = min(self._limit, self._stop_limit)
        self._every = min(5.0, shortest / 4)
        if math.isfinite(shortest):
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self, doing: str) -> None:
        """The loop is alive, and what it does next."""
        self._doing, self._last = doing, time.monotonic()

    @contextlib.contextmanager
    def paused(self, doing: str) -> Iterator[None]:
        """No limit inside but that of a stop: for work whose length nobody knows."""
        self._doing, self._paused = doing, True
        try:
            yield
        finally:
            self._paused = False
            self.alive(doing)

    def stopping(self) -> None:
        """A stop was asked for: from now on the end of the process is what has a limit."""
        self._stop_at = min(self._stop_at, time.monotonic() + self._stop_limit)

    def close(self) -> None:
        """No more watching."""
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            now = time.monotonic()
            if now > self._stop_at:
                self._end(f"not stopped {self._stop_limit:g} s after it was asked (stop_timeout)")
            if not self._paused and now - self._last > self._limit:
                self._end(f"no step done for {self._limit:g} s (step_timeout)")

    def _end(self, why: str) -> None:
        sys.stderr.write(
            f"\niv2: {why}, while {self._doing}. Where every thread stands is below. Exit code "
            f"{distributed.EXIT_RESTART}: the same command goes on from the last complete "
            "checkpoint.\n"
        )
        faulthandler.dump_traceback()
        distributed.leave(distributed.EXIT_RESTART)


class BadSteps:
    """Steps whose loss or gradient was not finite: kept with their clips in `bad_steps.jsonl`.

    Args:
      workdir: The run's folder.
      policy: "stop" ends the run; "skip" goes on, the step having left the state as it was.
      limit: Steps of the whole run that may be skipped, over all its starts.
      first_step: Step that this start goes on from; later ones of a killed start do not count.
    """

    def __init__(
        self, workdir: Path, policy: Literal["stop", "skip"], limit: int, first_step: int
    ) -> None:
        self._path = workdir / BAD_STEPS
        self._policy, self._limit = policy, limit
        self._lines = [line for line in _read(self._path) if line["step"] <= first_step]
        skipped = sum(line["policy"] == "skip" for line in self._lines)
        self.skipped = int(distributed.gather(np.asarray([skipped])).max())

    def add(self, step: int, kind: str, values: Mapping[str, float], clips: np.ndarray) -> bool:
        """Records a step; all processes must call it.

        Args:
          step: Which.
          kind: Media type of its batch, or "".
          values: Its metrics.
          clips: This process's rows of the batch's `index`.

        Returns:
          Whether to go on.
        """
        every = distributed.gather(clips)
        self.skipped += self._policy == "skip"
        metrics = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
        line = {"step": step, "policy": self._policy, "media": kind, "clips": every.tolist()}
        self._lines.append(line | {"metrics": metrics})
        if jax.process_index() == 0:
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            try:
                storage.write_whole(self._path, text)
            except Exception as error:  # of a disk or a bucket: the run's end is told all the same
                logger.warning("%s could not be written: %s", self._path, error)
        return self._policy == "skip" and self.skipped <= self._limit


def _read(path: Path) -> list[dict[str, Any]]:
    """The steps recorded by earlier starts.

    Raises:
      CheckpointError: The file is not what `BadSteps` writes.
    """
    if not path.exists():
        return []
    try:
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        return [line | {"step": line["step"], "policy": line["policy"]} for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); move it away, skipped steps then count from 0"
        ) from None


def check_shared(workdir: Path) -> None:
    """Refuses a workdir that is another folder on each host, as local disks are.

    Raises:
      CheckpointError: Some process does not see what process 0 wrote there.
    """
    if jax.process_count() == 1:
        return
    probe = workdir / ".shared"
    token = distributed.gather(np.asarray([time.time_ns() % 2**31], np.int32))[0]
    if jax.process_index() == 0:
        storage.write_whole(probe, str(token))
    distributed.any_process(False)  # all wait for process 0
    deadline = time.monotonic() + 15  # network disks show new files late
    while not (seen := probe.exists() and probe.read_text() == str(token)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    missing = distributed.any_process(not seen)
    if jax.process_index() == 0:
        probe.unlink()
    if missing:
        raise CheckpointError(
            f"--workdir {workdir} is not one folder for all {jax.process_count()} processes; take "
            "a bucket (gs://...) or a disk that all hosts share"
        )
