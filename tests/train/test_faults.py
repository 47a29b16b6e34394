"""Signals, the watchdog and damaged files, without a run around them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from iv2_jax import config as config_lib
from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.parallel import distributed
from iv2_jax.train import checkpoint, checksums, faults, loop, metrics, starting
from tests.multihost import disks
from tests.train import toy

HANGS = """
import sys, time
from iv2_jax.train import faults
dog = faults.Watchdog(float(sys.argv[1]), float(sys.argv[2]))
dog.alive("in step 7")
if sys.argv[2] != "0":
    dog.stopping()
for _ in range(100):
    time.sleep(0.1)
    if sys.argv[1] == "0":
        dog.alive("in step 8")  # alive, and yet it does not stop
"""


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        (("0.5", "0"), "no step done for 0.5 s (step_timeout), while in step 7"),
        (("0", "0.5"), "not stopped 0.5 s after it was asked (stop_timeout), while in step 8"),
    ],
)
def test_a_hang_ends_with_the_restart_code_and_shows_where(limits, told):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, *limits], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == distributed.EXIT_RESTART
    assert told in done.stderr
    assert 'File "<string>", line 9 in <module>' in done.stderr


def test_a_pause_has_no_limit(monkeypatch):
    ended = []
    monkeypatch.setattr(faults.Watchdog, "_end", lambda self, why: ended.append(why))
    dog = faults.Watchdog(0.2, 0)
    with dog.paused("evaluating"):
        dog._done.wait(0.6)
    assert not ended
    dog._done.wait(0.6)
    dog.close()
    assert ended


def test_checksums_name_the_damaged_file(tmp_path):
    (tmp_path / "params" / "d").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (tmp_path / "params" / "d" / name).write_bytes(name.encode() * 1000)
    (tmp_path / "other").write_text("x")
    checksums.write(tmp_path)
    assert checksums.damage(tmp_path) is None
    (tmp_path / "params" / "d" / "b").unlink()
    assert checksums.damage(tmp_path) == "params/d/b: No such file or directory"
    shares = [checksums.damage(tmp_path, process=p, processes=4) for p in range(4)]
    assert [why is None for why in shares].count(False) == 1
    assert checksums.damage(tmp_path, under="other") is None
    (tmp_path / checksums.FILE).write_text("{")
    assert "checksums.json is damaged" in checksums.damage(tmp_path)


def test_lines_wait_until_the_disk_has_room_again(tmp_path, caplog):
    path = tmp_path / "lines"
    path.write_text("zero\n")
    lines = metrics.Appender(path)
    lines.write("one\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, before[1]))
    try:
        lines.write("two\n")
        lines.write("three\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "zero\none\n"
    assert caplog.text.count("cannot be written to, its lines wait") == 1
    lines.write("four\n")
    lines.close()
    assert path.read_text() == "zero\none\ntwo\nthree\nfour\n"


def test_unreadable_bad_steps_are_not_counted_as_none(tmp_path):
    (tmp_path / faults.BAD_STEPS).write_text("half a li")
    with pytest.raises(CheckpointError, match=r"bad_steps\.jsonl cannot be read"):
        faults.BadSteps(tmp_path, "skip", 1, 0)


def test_how_processes_are_named(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.joining() is None
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(ConfigError, match=r"no --coordinator \(or JAX_COORDINATOR_ADDRESS\)"):
        distributed.joining(process=0)
    assert distributed.joining("[::1]:80", process=3).address == ("::1", 80)
    with pytest.raises(ConfigError, match="process 4 of 4: processes are numbered from 0 to 3"):
        distributed.joining("host:80", process=4)
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        distributed.joining("host", process=1)


def test_a_field_that_came_after_a_checkpoint_is_at_its_default():
    """A run goes on with newer code; a field that is gone, or another value, is still told."""
    now = config_lib.to_dict(toy.config())
    old = config_lib.to_dict(toy.config())
    del old["optimizer"]["b1"]
    assert starting._with_newer_fields(toy.config(), old) == now
    for changed in ({"gone": 1}, {"seed": 5}):
        saved = starting._with_newer_fields(toy.config(), old | changed)
        with pytest.raises(CheckpointError, match=f"config.{next(iter(changed))}"):
            checkpoint.check_same_run(saved, now, Path("run"))


@pytest.mark.parametrize("trouble", ["full", "read_only"])
def test_a_disk_in_trouble_for_a_while(tmp_path, monkeypatch, caplog, trouble):
    """A real one: checkpoints are missing meanwhile, the run and its lines are not."""
    workdir, undo = tmp_path / "run", []
    original = toy.ToyStage._batch

    def batch(self, step):
        if step == 6:
            folder = workdir / checkpoint.FOLDER
            undo.append(disks.fill(workdir) if trouble == "full" else disks.forbid(folder))
        if step == 14:
            undo.pop()()
        return original(self, step)

    monkeypatch.setattr(toy.ToyStage, "_batch", batch)
    with disks.small_disk(workdir, 16) as real:
        if trouble == "full" and not real:
            pytest.skip("a small disk cannot be mounted here")
        ending = loop.train(toy.config(steps=20, width=128), workdir)
        assert ending.reason == "complete"
        why = "the disk is full" if trouble == "full" else ""
        assert f"could not be written: {why}" in caplog.text
        steps = {int(p.name) for p in (workdir / checkpoint.FOLDER).iterdir()}
        assert steps == {16, 20}
        assert [x["step"] for x in metrics.read_metrics(workdir, "train")] == list(range(1, 21))
        if trouble == "full":
            disks.fill(workdir)
            with pytest.raises(CheckpointError, match=r"cannot write to --workdir .*disk is full"):
                loop.train(toy.config(steps=24, width=128, resume="force"), workdir)
