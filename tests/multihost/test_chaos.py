"""Seeded rounds of faults on one run; in the end it has the losses of an undisturbed one.

    IV2_CHAOS_ROUNDS=50 pytest -m slow tests/multihost/test_chaos.py -s

`IV2_CHAOS_SEED` draws other faults and moments. Every round goes on from the newest checkpoint
with other numbers of processes and devices than the one before, as they are drawn.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train import loop
from iv2_jax.train.metrics import read_metrics
from tests.multihost import disks
from tests.multihost.processes import Run, toy

ROUNDS = int(os.environ.get("IV2_CHAOS_ROUNDS", "4"))
SEED = int(os.environ.get("IV2_CHAOS_SEED", "0"))
STEPS_A_ROUND = 20  # more than any round gets done, so that the run outlives them
REACTION = 90  # seconds for all processes to be gone: a heartbeat of 10 s, on a busy machine
SLOW = {"IV2_TEST_PAUSE": "0.05", "IV2_JOIN_SECONDS": "60"}
DISK = 256  # MiB; a checkpoint is 12


@dataclass
class Round:
    """What a fault acts on.

    Attributes:
      run: The processes.
      draw: Random numbers.
      room: Whether the workdir is on a small disk of its own.
      began: When the fault struck, or when the signal was sent that ends the run.
    """

    run: Run
    draw: random.Random
    room: bool
    began: float = 0.0

    def signal(self, number: int, *victims: int) -> None:
        """Sends a signal to some of the processes."""
        self.began = time.monotonic()
        for victim in victims:
            self.run.processes[victim].send_signal(number)

    def any_process(self) -> int:
        """One of them."""
        return self.draw.randrange(len(self.run.processes))

    def wait_for_save(self) -> None:
        """Waits until a checkpoint is being written, and a little longer."""
        folder, deadline = self.run.workdir / checkpoint_lib.FOLDER, time.monotonic() + REACTION
        while not any("tmp" in path.name for path in folder.iterdir()):
            assert time.monotonic() < deadline, self.run.log()
            time.sleep(0.001)
        time.sleep(self.draw.uniform(0, 0.05))

    def others_end(self, victim: int) -> None:
        """All but the victim notice and ask to be started again."""
        others = [p for i, p in enumerate(self.run.processes) if i != victim]
        for process in others:
            left = self.began + REACTION - time.monotonic()
            assert process.wait(max(left, 0.1)) == loop.EXIT_RESTART, self.run.log()


def sigterm(round_: Round) -> None:
    """A slice is about to be taken away: one process is told."""
    round_.signal(signal.SIGTERM, round_.any_process())
    codes = round_.run.wait(REACTION)
    assert codes == [loop.EXIT_RESTART] * len(codes), round_.run.log()


def all_killed(round_: Round) -> None:
    """All processes die at once."""
    time.sleep(round_.draw.uniform(0, 0.3))
    round_.signal(signal.SIGKILL, *range(len(round_.run.processes)))


def all_killed_in_a_save(round_: Round) -> None:
    """All processes die while a checkpoint is being written."""
    round_.wait_for_save()
    round_.signal(signal.SIGKILL, *range(len(round_.run.processes)))


def peer_killed(round_: Round) -> None:
    """One of the processes dies."""
    victim = round_.any_process()
    round_.signal(signal.SIGKILL, victim)
    round_.others_end(victim)


def peer_killed_in_a_save(round_: Round) -> None:
    """One of the processes dies while a checkpoint is being written."""
    round_.wait_for_save()
    peer_killed(round_)


def peer_silent(round_: Round) -> None:
    """One of the processes says nothing more, as when its machine is cut off."""
    victim = round_.any_process()
    round_.signal(signal.SIGSTOP, victim)
    round_.others_end(victim)


def killed_early(round_: Round) -> None:
    """A process dies while all start; one that is slow to start waits for it all its time."""
    time.sleep(round_.draw.uniform(0, 4))
    round_.signal(signal.SIGKILL, round_.any_process())
    codes = round_.run.wait(REACTION + 2 * int(SLOW["IV2_JOIN_SECONDS"]))
    assert all(code in (loop.EXIT_RESTART, -signal.SIGKILL) for code in codes), round_.run.log()


def disk_full(round_: Round) -> None:
    """No checkpoint can be written any more; with luck there is room again later."""
    if round_.room:
        leave = round_.draw.choice((0, 1 << 20))

        def fill() -> Callable[[], None]:
            return disks.fill(round_.run.workdir, leave)

        _nothing_is_saved(round_, fill(), fill)
    else:
        _nothing_is_saved(round_, None)  # the size of files is limited all along


def unwritable(round_: Round) -> None:
    """The folder of checkpoints may not be written to any more; with luck it may again later."""
    _nothing_is_saved(round_, disks.forbid(round_.run.workdir / checkpoint_lib.FOLDER))


def _nothing_is_saved(
    round_: Round, mend: Callable[[], object] | None, again: Callable[[], object] | None = None
) -> None:
    """The run says so and goes on; it ends unsaved, or saved when the trouble ends before.

    Args:
      round_: The round.
      mend: Ends the trouble.
      again: Makes trouble again: old checkpoints and remains that the run deletes make room on a
        disk. A save may still find that room, and then has to be what the run says.
    """
    run, in_time = round_.run, mend is not None and round_.draw.random() < 0.5
    try:
        run.wait_for("could not be written", REACTION, again or (lambda: None))
        run.wait_for_step(run.last_step() + round_.draw.randint(1, 3), REACTION)
        if in_time:
            mend()
        round_.signal(signal.SIGTERM, 0)
        codes = run.wait(REACTION)
    finally:
        if mend and not in_time:
            mend()
    saved = f"run ended: stopped on request at step {_latest(run.workdir)} " in run.said()
    if in_time or (again and saved):
        assert saved, run.log()
        assert codes == [loop.EXIT_RESTART] * len(codes), run.log()
    else:
        assert codes == [loop.EXIT_ERROR] * len(codes), run.log()
        assert "is not saved" in run.said(), run.log()


ONE, SEVERAL = (1, 2, 2, 4), (2, 2, 4)
# fault -> numbers of processes it may meet
FAULTS = {
    sigterm: ONE,
    all_killed: ONE,
    all_killed_in_a_save: ONE,
    peer_killed: SEVERAL,
    peer_killed_in_a_save: SEVERAL,
    peer_silent: SEVERAL,
    killed_early: ONE,
    disk_full: (1, 2),
    unwritable: (1, 2),
}


def _start(config: dict, workdir: Path, fault, draw: random.Random, room: bool) -> Run:
    """The run goes on, with numbers of processes and devices and a mesh of its own."""
    limited = fault is disk_full and not room
    processes = 1 if limited else draw.choice(FAULTS[fault])
    devices = draw.choice((1, 2, 4) if processes == 1 else (1, 2))
    sizes = [n for n in (1, 2, 4, 8) if processes * devices % n == 0]
    fsdp = draw.choice(sizes)
    environment = dict(SLOW)
    if limited:
        metrics = workdir / "metrics.jsonl"
        used = metrics.stat().st_size if metrics.exists() else 0
        environment["IV2_TEST_FILE_BYTES"] = str(used + 200_000)
    config = config | {"mesh": {"data": -1, "fsdp": fsdp}}
    return Run(config, workdir, processes, devices=devices, environment=environment)


def _latest(workdir: Path) -> int:
    """The newest complete checkpoint; 0 when there is none."""
    folder = workdir / checkpoint_lib.FOLDER
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
    config = toy(
        steps=STEPS_A_ROUND * (ROUNDS + 1),
        width=1024,
        checkpoint={"every": 5, "keep": 2},
        mesh={"data": 1, "fsdp": 2},
    )
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "run"
    assert Run(config, undisturbed, 1, devices=2).wait(600) == [0]
    with disks.small_disk(workdir, DISK) as room:
        seconds, meshes = _rounds(config, workdir, room)
        assert Run(config, workdir, 1, devices=2).wait(600) == [0]
        _same_in_the_end(undisturbed, workdir)
    print("\nfault: rounds, seconds until all had ended (median, longest)")
    for name, took in sorted(seconds.items()):
        print(f"{name}: {len(took)}, {np.median(took):.1f}, {max(took):.1f}")
    if len(FAULTS) <= ROUNDS:
        assert seconds.keys() == {fault.__name__ for fault in FAULTS}
        assert {processes for processes, _ in meshes} >= {1, 2}
        assert len(meshes) > 3


def _rounds(
    config: dict, workdir: Path, room: bool
) -> tuple[dict[str, list[float]], set[tuple[int, str]]]:
    """Seconds each fault took, and what the run ran on."""
    draw, latest = random.Random(SEED), 0
    order: list = []
    seconds, meshes = collections.defaultdict(list), set()
    for number in range(ROUNDS):
        if not order:  # every fault before any comes again
            order = draw.sample(list(FAULTS), len(FAULTS))
        fault = order.pop()
        run = _start(config, workdir, fault, draw, room)
        round_ = Round(run, draw, room)
        try:
            if fault is not killed_early:
                run.wait_for_step(latest + draw.randint(1, 8))
                if latest:
                    assert f"resumed {workdir} at step {latest} " in run.said(), run.log()
            fault(round_)
        finally:
            run.kill()
        took = time.monotonic() - round_.began
        seconds[fault.__name__].append(took)
        meshes.add((len(run.processes), run.mesh))
        before, latest = latest, _latest(workdir)
        told = f"round {number}: {fault.__name__}, {len(run.processes)} processes, {run.mesh}"
        print(f"{told}, {took:.1f} s, checkpoint {before} -> {latest}", flush=True)
        assert latest >= before, told
    return seconds, meshes


def _same_in_the_end(undisturbed: Path, workdir: Path) -> None:
    """Every step's loss, and the weights."""
    want, got = (
        {line["step"]: line["loss"] for line in read_metrics(folder, "train")}
        for folder in (undisturbed, workdir)
    )
    assert list(got) == list(want)
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)
    a, _ = checkpoint_lib.load_params(undisturbed)
    b, _ = checkpoint_lib.load_params(workdir)
    np.testing.assert_allclose(b["dense"]["kernel"], a["dense"]["kernel"], rtol=1e-4, atol=1e-6)
