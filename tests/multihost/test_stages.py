"""Stages in several processes: the figures of one process on the same mesh."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.train import loop
from iv2_jax.train.metrics import read_metrics
from iv2_jax.train.stage import config_class
from tests.data import clips
from tests.multihost.processes import Run, toy
from tests.train import tiny, tiny_align, tiny_instruct


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


# Four processes that each compile a step take minutes on two cores.
IN_FOUR = pytest.param(4, marks=[pytest.mark.slow, pytest.mark.pod])


def test_four_processes(tmp_path):
    config, lines = toy(mesh={"data": 2, "fsdp": 2}), []
    for processes in (1, 4):
        run = Run(config, tmp_path / str(processes), processes, devices=4 // processes)
        assert run.wait() == [0] * processes, run.log()
        lines.append([(x["step"], x["loss"]) for x in read_metrics(run.workdir)])
    assert len(lines[0]) > 12
    np.testing.assert_allclose(lines[1], lines[0], rtol=1e-6)


@pytest.mark.parametrize("processes", [2, IN_FOUR])
def test_stage_one_in_several_processes(tmp_path, monkeypatch, processes):
    tiny.register(monkeypatch)
    _same_as_one_process(_stage1(tmp_path), tmp_path, processes)
    # Written once, by process 0.
    names = {p.name for p in (tmp_path / "several").iterdir()}
    assert names == {p.name for p in (tmp_path / "one").iterdir()}
    assert len(json.loads((tmp_path / "several" / "goodput.json").read_text())) == 1


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), IN_FOUR])
def test_stage_two_in_several_processes(tmp_path, processes):
    values = tiny_align.values(tmp_path, ("video",), steps=3, mesh={"data": 2, "fsdp": 2})
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


@pytest.mark.slow
@pytest.mark.pod
@pytest.mark.parametrize("processes", [2, 4])
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
