"""SIGKILL in the middle of a save: the run goes on from the last complete checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from iv2_jax.train import loop
from iv2_jax.train.metrics import read_metrics
from tests.train import toy

# Wide enough that writing takes longer than a step, saved at every step.
FIELDS = {"steps": 14, "width": 1024, "checkpoint": {"every": 1, "keep": 2}}
SCRIPT = """
import sys
from iv2_jax.train import loop
from tests.train import toy
loop.train(toy.config(**{fields!r}), sys.argv[1])
"""


def _start(workdir: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    script = SCRIPT.format(fields=FIELDS)
    return subprocess.Popen([sys.executable, "-c", script, str(workdir)], env=environment)


def _kill_while_saving(workdir: Path) -> None:
    """Waits until a save is under way behind at least two complete ones, then kills."""
    process = _start(workdir)
    folder, deadline = workdir / "checkpoints", time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
            complete = [n for n in names if n.isdigit()]
            if any("tmp" in n for n in names) and max(map(int, complete), default=0) >= 2:
                return
            time.sleep(0.001)
        raise AssertionError("no save was caught under way within two minutes")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_killed_while_saving_goes_on_with_the_same_losses(tmp_path):
    loop.train(toy.config(**FIELDS), tmp_path / "whole")
    _kill_while_saving(tmp_path / "killed")
    ending = loop.train(toy.config(**FIELDS), tmp_path / "killed")
    assert ending.reason == "complete"
    want, got = (
        {line["step"]: line["loss"] for line in read_metrics(tmp_path / name, "train")}
        for name in ("whole", "killed")
    )
    assert got == want
    left = [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir() if "tmp" in p.name]
    assert not left, "the half-written checkpoint was not cleaned up"
