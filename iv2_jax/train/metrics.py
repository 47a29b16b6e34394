"""One writer for the console (a progress bar), `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from iv2_jax import storage

logger = logging.getLogger(__name__)

JSONL = "metrics.jsonl"

# Of figures in groups, such as sim/t2v_r1, the console shows these; the files have all.
_SHOWN = ("t2v_r1", "t2v_r5", "v2t_r1", "v2t_r5")


class MetricWriter:
    """Writes scalars of process 0; the other processes write nothing.

    `metrics.jsonl` has one object a line: `step`, `kind` ("train" or "eval") and the scalars.
    After a resume it goes on behind the lines up to the resumed step; later lines, of steps that
    a killed run did without a checkpoint, are dropped so that no step stands there twice.
    """

    def __init__(
        self, workdir: Path, total_steps: int, first_step: int, *, tensorboard: bool = True
    ) -> None:
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._mirror = storage.Mirror(workdir)
        folder = self._mirror.local
        path = folder / JSONL
        kept = [line for line in read_metrics(workdir) if line["step"] <= first_step]
        storage.write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = Appender(path)
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=None,  # no bar where the output is no terminal; lines are printed instead
            file=sys.stderr,
        )

    def write(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Writes the scalars of one step everywhere but the bar."""
        if not self._active:
            return
        values = {k: float(v) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **_json_safe(values)}) + "\n")
        try:
            for name, value in values.items() if self._events else ():
                self._events.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            logger.warning("TensorBoard's events could not be written: %s", error)
        self._mirror.push()
        if self._bar.disable or kind == "eval":
            shown = {k: v for k, v in values.items() if "/" not in k or k.endswith(_SHOWN)}
            self.say(f"step {step} {kind}  " + _short(shown, limit=24))

    def advance(self, step: int, values: Mapping[str, float]) -> None:
        """Moves the bar to `step` and shows the main scalars."""
        if self._active and not self._bar.disable:
            self._bar.set_postfix_str(_short(values, limit=4), refresh=False)
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if not self._active:
            return
        try:
            self._bar.write(text, file=sys.stderr)
        except OSError as error:  # a log on a disk that is full; the metrics say it all
            logger.warning("the console takes no more text: %s", error)

    def close(self) -> None:
        """Flushes and closes the files and the bar."""
        if not self._active:
            return
        try:
            self._bar.close()
            if self._events:
                self._events.close()
        except OSError as error:
            logger.warning("the console or TensorBoard's events: %s", error)
        self._file.close()
        self._mirror.close()


class Appender:
    """Whole lines at the end of a file; those for which the disk has no room wait for it.

    Args:
      path: The file, which exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("r+b", buffering=0)
        self._end = self._file.seek(0, 2)
        self._waiting = b""

    def write(self, text: str) -> None:
        """Appends, or says why it cannot and keeps the text for the next time."""
        told = bool(self._waiting)
        self._waiting += text.encode()
        try:
            self._file.seek(self._end)
            done = self._file.write(self._waiting)
            if done < len(self._waiting):
                self._file.truncate(self._end)  # no half lines
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not told:
                logger.error("%s cannot be written to, its lines wait: %s", self._path, error)
            return
        self._end, self._waiting = self._end + done, b""
        if told:
            logger.warning("%s is written to again", self._path)

    def close(self) -> None:
        """Tries a last time."""
        if self._waiting:
            self.write("")
        self._file.close()


def read_metrics(workdir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line cut off by a kill is left out.

    Args:
      workdir: The run's folder.
      kind: Only "train" or only "eval" lines.
    """
    path = workdir / JSONL
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # half a line: the process was killed while writing it
        if kind is None or line["kind"] == kind:
            lines.append(line)
    return lines


def _json_safe(values: Mapping[str, float]) -> dict[str, float | str]:
    """JSON has no NaN or infinity: those become strings."""
    return {k: v if math.isfinite(v) else str(v) for k, v in values.items()}


def _short(values: Mapping[str, float], limit: int = 12) -> str:
    return "  ".join(f"{k} {v:.4g}" for k, v in list(values.items())[:limit])


class Clock:
    """Throughput and the share of time spent waiting for data, per step."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._started = False
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def waited(self) -> float:
        """Seconds waited since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def tick(self, clips: int, tokens: int, waited: float) -> dict[str, float]:
        """Rates of a step of so many clips and tokens, for which data was waited so many seconds.

        The first is left out, it fills the pipe.
        """
        now = time.monotonic()
        elapsed = max(now - self._last, 1e-9)
        started, self._last, self._started = self._started, now, True
        if not started:
            return {}
        return {
            "clips_per_s": clips / elapsed,
            "tokens_per_s": tokens / elapsed,
            "data_wait": min(waited / elapsed, 1.0),
        }
