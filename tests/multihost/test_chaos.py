"""Seeded rounds of faults on one run; in the end it has the losses of an undisturbed one.

    IV2_CHAOS_ROUNDS=50 pytest -m slow tests/multihost/test_chaos.py

`IV2_CHAOS_SEED` draws other faults and moments.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train import loop
from iv2_jax.train.metrics import read_metrics
from tests.multihost.processes import Run, toy

ROUNDS = int(os.environ.get("IV2_CHAOS_ROUNDS", "4"))
SEED = int(os.environ.get("IV2_CHAOS_SEED", "0"))
STEPS_A_ROUND = 40  # more than any round gets done, so that the run outlives them
REACTION = 90  # seconds for all processes to be gone: a heartbeat of 10 s, on a busy machine
SLOW = {"IV2_TEST_PAUSE": "0.05"}


def sigterm(run: Run, draw: random.Random) -> None:
    """A slice is about to be taken away: one process is told."""
    draw.choice(run.processes).send_signal(signal.SIGTERM)
    assert run.wait(REACTION) == [loop.EXIT_RESTART] * len(run.processes), run.log()


def sigkill(run: Run, draw: random.Random) -> None:
    """All processes die at once."""
    time.sleep(draw.uniform(0, 0.3))
    run.kill()


def save_interrupted(run: Run, draw: random.Random) -> None:
    """All processes die while a checkpoint is being written."""
    folder, deadline = run.workdir / "checkpoints", time.monotonic() + REACTION
    while not any("tmp" in path.name for path in folder.iterdir()):
        assert time.monotonic() < deadline, run.log()
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.05))
    run.kill()


def peer_lost(run: Run, draw: random.Random) -> None:
    """One of the processes dies."""
    victim = draw.randrange(len(run.processes))
    run.processes[victim].send_signal(signal.SIGKILL)
    codes = run.wait(REACTION)
    assert codes.pop(victim) == -signal.SIGKILL
    assert codes == [loop.EXIT_RESTART] * len(codes), run.log()


def disk_full(run: Run, draw: random.Random) -> None:
    """No checkpoint can be written any more; the run goes on, and says so when it ends."""
    run.wait_for("could not be written", REACTION)
    run.wait_for_step(run.last_step() + draw.randint(1, 3))
    run.processes[0].send_signal(signal.SIGTERM)
    assert run.wait(REACTION) == [loop.EXIT_ERROR], run.log()
    assert "is not saved" in run.said()


def killed_early(run: Run, draw: random.Random) -> None:
    """A process dies while all start."""
    time.sleep(draw.uniform(0, 4))
    victim = draw.choice(run.processes)
    victim.send_signal(signal.SIGKILL)
    codes = run.wait(REACTION)
    assert all(code in (loop.EXIT_RESTART, -signal.SIGKILL) for code in codes), run.log()


# fault -> numbers of processes it may meet
FAULTS = {
    sigterm: (1, 2),
    sigkill: (1, 2),
    save_interrupted: (1, 2),
    peer_lost: (2,),
    disk_full: (1,),
    killed_early: (1, 2),
}


def _start(config: dict, workdir: Path, fault, draw: random.Random) -> Run:
    processes = draw.choice(FAULTS[fault])
    environment = {**SLOW, "IV2_JOIN_SECONDS": "60"}
    if fault is disk_full:
        metrics = workdir / "metrics.jsonl"
        used = metrics.stat().st_size if metrics.exists() else 0
        environment["IV2_TEST_FILE_BYTES"] = str(used + 200_000)
    return Run(config, workdir, processes, devices=2 // processes, environment=environment)


def _latest(workdir: Path) -> int:
    """The newest complete checkpoint; 0 when there is none."""
    folder = workdir / checkpoint_lib.FOLDER
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
    config = toy(
        steps=STEPS_A_ROUND * (ROUNDS + 1),
        width=1024,  # a checkpoint is larger than that
        checkpoint={"every": 5, "keep": 2},
        mesh={"data": 1, "fsdp": 2},
    )
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    assert Run(config, undisturbed, 1, devices=2).wait(600) == [0]
    draw, latest = random.Random(SEED), 0
    order: list = []
    for number in range(ROUNDS):
        if not order:  # every fault in every six rounds
            order = draw.sample(list(FAULTS), len(FAULTS))
        fault = order.pop()
        run = _start(config, workdir, fault, draw)
        try:
            if fault is not killed_early:
                run.wait_for_step(latest + draw.randint(1, 8))
            fault(run, draw)
        finally:
            run.kill()
        before, latest = latest, _latest(workdir)
        told = f"round {number}: {fault.__name__}, {len(run.processes)} processes"
        print(f"{told}, checkpoint {before} -> {latest}")
        assert latest >= before, told
    assert Run(config, workdir, 1, devices=2).wait(600) == [0]

    want, got = (
        {line["step"]: line["loss"] for line in read_metrics(folder, "train")}
        for folder in (undisturbed, workdir)
    )
    assert list(got) == list(want)
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)
    a, _ = checkpoint_lib.load_params(undisturbed)
    b, _ = checkpoint_lib.load_params(workdir)
    np.testing.assert_allclose(b["dense"]["kernel"], a["dense"]["kernel"], rtol=1e-4, atol=1e-6)
