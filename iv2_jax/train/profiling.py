"""`--profile STEPS`: traces of named steps, for XProf or TensorBoard."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import jax

from iv2_jax import storage
from iv2_jax.errors import ConfigError

logger = logging.getLogger(__name__)

FOLDER = "profile"


def read_steps(text: str) -> tuple[tuple[int, int], ...]:
    """Ranges of steps, both ends included: "20", "20:22" or "20:22,1000:1002".

    Raises:
      ConfigError: Anything else, ranges that overlap or do not ascend.
    """
    ranges = []
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d+)(?::(\d+))?", part)
        if not match:
            raise ConfigError(
                f"--profile {text!r}: expected steps such as 20, 20:22 or 20:22,90:92"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first < 1 or last < first or (ranges and first <= ranges[-1][1]):
            raise ConfigError(f"--profile {text!r}: steps start at 1 and must ascend, at {part}")
        ranges.append((first, last))
    return tuple(ranges)


class Profiler:
    """Traces ranges of steps into `WORKDIR/profile`; every process writes its own file.

    The device is drained before a trace begins and before it ends, so that it holds the whole of
    its steps and nothing else. Those steps are slower; their rates stay in the metrics.
    """

    def __init__(self, workdir: Path, ranges: tuple[tuple[int, int], ...]) -> None:
        self._workdir = workdir
        self._mirror: storage.Mirror | None = None
        self._ranges = list(ranges)
        self._tracing = False

    def before(self, step: int, state: Any) -> None:
        """Starts a trace if `step` is the first of a range, or within one after a resume."""
        while self._ranges and self._ranges[0][1] < step:
            first, last = self._ranges.pop(0)
            logger.warning("steps %d to %d were done before; they are not profiled", first, last)
        if self._ranges and not self._tracing and step >= self._ranges[0][0]:
            jax.block_until_ready(state)
            self._mirror = storage.Mirror(self._workdir)
            jax.profiler.start_trace(str(self._mirror.local / FOLDER))
            self._tracing = True

    def after(self, step: int, state: Any) -> None:
        """Ends the trace if `step` is the last of its range."""
        if self._tracing and step >= self._ranges[0][1]:
            jax.block_until_ready(state)
            self._end(step)

    def close(self) -> None:
        """Ends a trace that a stop cut short."""
        if self._tracing:
            self._end(None)

    def _end(self, step: int | None) -> None:
        jax.profiler.stop_trace()
        self._mirror.close()
        self._tracing = False
        first, last = self._ranges.pop(0)
        if jax.process_index() == 0:
            done = f"{first} to {last}" if step else f"from {first} on, cut short"
            logger.info("profiled steps %s: xprof --logdir %s", done, self._workdir / FOLDER)
