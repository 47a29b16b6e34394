"""Where the wall time of a run goes, over all its starts: steps, waiting, saving, restarting."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from iv2_jax import storage

logger = logging.getLogger(__name__)

FILE = "goodput.json"
# Everything outside these is start: building, loading, restoring, and the time between two starts.
KINDS = ("step", "data_wait", "checkpoint", "eval", "compile")
START = "start"
_NAMES = {"step": "steps", "data_wait": "data wait", "eval": "evaluation", START: "starts"}
_WRITE_EVERY = 60.0  # seconds; what a kill can make the file forget


@dataclass
class Attempt:
    """One process's part of a run; times in seconds, `started` and `ended` since the epoch."""

    started: float
    ended: float
    first_step: int
    last_step: int
    seconds: dict[str, float] = field(default_factory=dict)


class Goodput:
    """Counts the time of this process by kind and keeps it in the workdir beside earlier starts.

    Args:
      workdir: The run's folder; `goodput.json` there has one entry a start.
      active: Whether to write the file (one process of a run does).
    """

    def __init__(self, workdir: Path, *, active: bool = True) -> None:
        self._path = workdir / FILE
        self._active = active
        now = time.time()
        self.attempts = [*self._read(), Attempt(now, now, 0, 0, dict.fromkeys(KINDS, 0.0))]
        self._stack: list[str] = []
        self._mark = self._written = time.monotonic()

    def _read(self) -> list[Attempt]:
        """Earlier starts; none when the file is missing or was cut off by a full disk."""
        try:
            return [Attempt(**entry) for entry in json.loads(self._path.read_text())]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s is not readable, counting from now: %s", self._path, error)
            return []

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Counts the time inside as `kind`; what is inside of that again counts only once."""
        self._lap()
        self._stack.append(kind)
        try:
            yield
        finally:
            self._lap()
            self._stack.pop()

    def _lap(self) -> None:
        """Books the time since the last call on the innermost kind."""
        now = time.monotonic()
        if self._stack:
            self.attempts[-1].seconds[self._stack[-1]] += now - self._mark
        self._mark = now

    def begin(self, step: int) -> None:
        """The step that this start goes on from."""
        self.attempts[-1].first_step = self.attempts[-1].last_step = step

    def reached(self, step: int) -> None:
        """Steps done so far; writes the file now and then."""
        self.attempts[-1].last_step = step
        if time.monotonic() - self._written > _WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Writes the file; a disk that is full costs the figures, not the run."""
        self._lap()
        self._written = time.monotonic()
        self.attempts[-1].ended = time.time()
        if not self._active:
            return
        text = json.dumps([asdict(attempt) for attempt in self.attempts], indent=1) + "\n"
        try:
            storage.write_whole(self._path, text)
        except Exception as error:  # of a disk or a bucket
            logger.warning("%s could not be written: %s", self._path, error)

    def shares(self) -> dict[str, float]:
        """Share of the wall time by kind, since the first start; they sum to 1."""
        self._lap()
        self.attempts[-1].ended = time.time()
        return shares(self.attempts)

    def line(self) -> str:
        """One line for people."""
        parts = self.shares()
        wall = self.attempts[-1].ended - self.attempts[0].started
        listed = ", ".join(
            f"{_NAMES.get(kind, kind)} {100 * share:.1f} %"
            for kind, share in parts.items()
            if share >= 0.0005
        )
        starts = len(self.attempts)
        twice = sum(_redone(self.attempts))
        more = f"; {starts} starts, {twice} steps done twice" if starts > 1 else ""
        return f"goodput {100 * parts['step']:.1f} % of {wall / 3600:.2f} h: {listed}{more}"


def _redone(attempts: list[Attempt]) -> list[int]:
    """Steps of each start that the next one had to do again."""
    following = [a.first_step for a in attempts[1:]] + [attempts[-1].last_step]
    return [max(0, a.last_step - n) for a, n in zip(attempts, following, strict=True)]


def shares(attempts: list[Attempt]) -> dict[str, float]:
    """Share of the wall time from the first start to the last end, by kind.

    Steps that were done again, with their waiting, count as lost to the restart.
    """
    wall = max(attempts[-1].ended - attempts[0].started, 1e-9)
    totals = dict.fromkeys(KINDS, 0.0)
    for attempt, redone in zip(attempts, _redone(attempts), strict=True):
        kept = 1 - redone / max(attempt.last_step - attempt.first_step, 1)
        for kind, seconds in attempt.seconds.items():
            totals[kind] += seconds * (kept if kind in ("step", "data_wait") else 1)
    parts = {kind: seconds / wall for kind, seconds in totals.items()}
    return {**parts, START: max(0.0, 1 - sum(parts.values()))}
