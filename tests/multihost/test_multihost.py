"""Runs of several processes: the same numbers as one, one end for all, no hang."""

from __future__ import annotations

import json
import signal
import socket
import time

import numpy as np
import pytest

from iv2_jax.train.metrics import read_metrics
from tests.multihost.processes import Run, free_port, toy


def losses(workdir, kind="train"):
    return {line["step"]: line["loss"] for line in read_metrics(workdir, kind)}


def test_one_process_is_told_to_stop_and_all_do(tmp_path):
    """And go on with another number of processes, to the numbers of an undisturbed run."""
    config = toy(steps=40, checkpoint={"every": 1000})
    assert Run(config, tmp_path / "whole", 1, devices=2).wait() == [0]
    stopped = Run(config, tmp_path / "run", 2, environment={"IV2_TEST_PAUSE": "0.05"})
    stopped.wait_for_step(4)
    stopped.processes[1].send_signal(signal.SIGTERM)  # not the one that writes
    assert stopped.wait(60) == [75, 75], stopped.log()
    steps = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(steps) == 1
    assert 4 < steps[0] < 40
    assert Run(config, tmp_path / "run", 1, devices=2).wait() == [0]
    want, got = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-6)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_lost_process_ends_the_others(tmp_path, victim):
    run = Run(toy(steps=10000), tmp_path / "run", 2, environment={"IV2_TEST_PAUSE": "0.05"})
    run.wait_for_step(5)
    run.processes[victim].send_signal(signal.SIGKILL)
    since = time.monotonic()
    codes = run.wait(60)
    assert codes[1 - victim] == 75, run.log()
    assert codes[victim] == -signal.SIGKILL
    assert time.monotonic() - since < 45
    assert "another process of the run was lost" in run.logs[1 - victim].read_text()


def test_a_nan_names_the_clips_of_all_processes(tmp_path):
    run = Run(toy(nan_at=5, on_nan="skip"), tmp_path / "run", 2)
    assert run.wait() == [0, 0], run.log()
    (line,) = map(json.loads, (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines())
    assert (line["step"], line["clips"]) == (6, list(range(40, 48)))


@pytest.mark.slow
def test_what_keeps_a_run_from_starting_is_told(tmp_path):
    soon = {"IV2_JOIN_SECONDS": "3"}
    alone = Run(toy(), tmp_path / "first", 2, only=(0,), environment=soon)
    assert alone.wait(60) == [75]
    assert "did not find all the others within 3 s" in alone.log()
    lonely = Run(toy(), tmp_path / "second", 2, only=(1,), environment=soon)
    assert lonely.wait(60) == [75]
    assert "no answer at --coordinator localhost" in lonely.log()


@pytest.mark.slow
def test_processes_with_other_configs_are_refused(tmp_path):
    port = free_port()
    runs = [
        Run(toy(seed=number), tmp_path / f"run{number}", 2, only=(number,), port=port)
        for number in (0, 1)
    ]
    assert [run.wait() for run in runs] == [[2], [2]], runs[0].log()
    assert "processes [1] were given another --config or --workdir" in runs[1].log()


def test_a_taken_port_is_told(monkeypatch):
    from iv2_jax.errors import ConfigError
    from iv2_jax.parallel import distributed

    monkeypatch.setattr(distributed, "_PORT_SECONDS", 0.1)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on port \d+: Address already in use"):
            distributed._wait_for_port(other.getsockname()[1])
