"""Runs of several processes: the same numbers as one, one end for all, no hang."""

from __future__ import annotations

import json
import signal
import socket
import time

import jax
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.train import loop
from iv2_jax.train.metrics import read_metrics
from iv2_jax.train.stage import config_class
from tests.data import clips
from tests.multihost.processes import Run, free_port, toy
from tests.train import tiny, tiny_align, tiny_instruct


def losses(workdir, kind="train"):
    return {line["step"]: line["loss"] for line in read_metrics(workdir, kind)}


def _same_as_one_process(config, folder, processes, rtol=1e-6):
    """Does the run in this process and in others on the same mesh, and compares every figure."""
    one, several = folder / "one", folder / "several"
    mesh = config["mesh"] | {"max_devices": 4}
    here = config_lib.build(config_class(config["stage"]), config | {"mesh": mesh})
    assert loop.train(here, one).reason == "complete"
    run = Run(config, several, processes, devices=4 // processes)
    assert run.wait() == [0] * processes, run.log()
    timing = {"clips_per_s", "tokens_per_s", "data_wait", "goodput"}
    want, got = read_metrics(one), read_metrics(several)
    assert [(x["step"], x["kind"]) for x in got] == [(x["step"], x["kind"]) for x in want]
    for a, b in zip(want, got, strict=True):
        assert a.keys() - timing == b.keys() - timing
        for name in a.keys() - timing - {"step", "kind"}:
            # Sums of squares over all gradients differ in their order between one and several.
            within = 1e-5 if name == "grad_norm" else rtol
            np.testing.assert_allclose(b[name], a[name], rtol=within, atol=1e-7, err_msg=name)
    return run


def _stage1(folder):
    manifest = clips.write_list(folder / "clips", 9)
    data = {"source": str(manifest), "num_frames": 2 * tiny.FRAMES, "size": tiny.SIZE}
    return tiny.values(
        steps=3,
        data=data,
        # Nine clips in batches of eight: the last batch is filled up, on one process only.
        eval_data=data | {"eval": True, "augment": "stretch"},
        mesh={"data": 2, "fsdp": 2},
    )


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_stage_one_in_several_processes(tmp_path, monkeypatch, processes):
    tiny.register(monkeypatch)
    _same_as_one_process(_stage1(tmp_path), tmp_path, processes)
    # Written once, by process 0.
    names = {p.name for p in (tmp_path / "several").iterdir()}
    assert names == {p.name for p in (tmp_path / "one").iterdir()}
    assert len(json.loads((tmp_path / "several" / "goodput.json").read_text())) == 1


# Four processes that each compile a step take minutes on two cores.
TWO_AND_FOUR = [
    pytest.param(2, marks=pytest.mark.slow),
    pytest.param(4, marks=[pytest.mark.slow, pytest.mark.pod]),
]


@pytest.mark.parametrize("processes", TWO_AND_FOUR)
def test_stage_two_in_several_processes(tmp_path, processes):
    media = ("image", "video")
    values = tiny_align.values(tmp_path, media, steps=4, mesh={"data": 2, "fsdp": 2})
    values["loss"]["weights"] = {"vtc": 1.0, "vtm": 1.0}
    values["loss"]["captions"] = {}
    plain = config_lib.to_dict(config_lib.build(tiny_align.AlignConfig, values))
    _same_as_one_process(plain, tmp_path, processes)
    if processes == 2:
        _same_retrieval(tmp_path)


def _same_retrieval(folder):
    """`iv2 eval` of the run's checkpoint, with the second pass, in two processes and in one."""
    found = []
    for processes in (1, 2):
        out = folder / f"retrieval{processes}.json"
        verb = ("eval", "--task", "retrieval", "--ckpt", str(folder / "one"), "--rerank", "2")
        verb += ("--batch-size", "4", "--out", str(out))
        run = Run({}, folder / "eval", processes, devices=4 // processes, verb=verb)
        assert run.wait() == [0] * processes, run.log()
        (row,) = json.loads(out.read_text())["rows"]
        found.append(dict(jax.tree_util.tree_leaves_with_path(row)))
    one, two = found
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6))


@pytest.mark.parametrize("processes", TWO_AND_FOUR)
def test_stage_three_in_several_processes(tmp_path, processes):
    """With an evaluation whose last batch the processes fill unequally."""
    tiny_instruct.write_tokenizer(tmp_path / "tok")
    mix = tiny_instruct.write_talks(tmp_path / "data")
    values = tiny_instruct.values(
        tmp_path / "tok",
        mix,
        tiny_instruct.model(),
        eval_mix=str(mix),
        batch_size=4,
        steps=3,
        mesh={"data": 2, "fsdp": 2},
    )
    plain = config_lib.to_dict(config_lib.build(config_class("instruct"), values))
    _same_as_one_process(plain, tmp_path, processes)


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
