"""The loop: exact resume, endings, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import signal

import jax
import numpy as np
import pytest

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train import loop, optim, starting
from iv2_jax.train.metrics import read_metrics
from tests.train import toy


def losses(workdir, kind="train"):
    return {line["step"]: line["loss"] for line in read_metrics(workdir, kind)}


def test_learns_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO", "iv2_jax")
    ending = loop.train(toy.config(steps=60, eval_every=20), tmp_path)
    assert (ending.reason, ending.step, ending.exit_code) == ("complete", 60, 0)
    evals = losses(tmp_path, "eval")
    assert sorted(evals) == [0, 20, 40, 60]
    assert evals[60] < 0.5 * evals[0]
    assert caplog.records[-1].message.startswith("run ended: all 60 steps done")
    line = read_metrics(tmp_path, "train")[-1]
    assert {"lr", "grad_norm", "error", "clips_per_s", "tokens_per_s", "data_wait"} <= line.keys()
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 60


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_stopped_and_resumed_equals_unbroken(tmp_path, stop_at):
    loop.train(toy.config(), tmp_path / "a")
    ending = loop.train(toy.config(stop_after=stop_at), tmp_path / "b")
    assert (ending.reason, ending.step, ending.exit_code) == ("stopped", stop_at, loop.EXIT_RESTART)
    loop.train(toy.config(), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    a, _ = checkpoint_lib.load_params(tmp_path / "a")
    b, _ = checkpoint_lib.load_params(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_sigterm_saves_and_goes_on(tmp_path, monkeypatch):
    loop.train(toy.config(), tmp_path / "a")
    original = toy.ToyStage._batch

    def batch(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(toy.ToyStage, "_batch", batch)
    ending = loop.train(toy.config(), tmp_path / "b")
    assert (ending.reason, ending.step) == ("stopped", 6)
    monkeypatch.undo()
    loop.train(toy.config(), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_one_and_eight_devices_agree_and_resume_on_each_other(tmp_path):
    one, eight = {"max_devices": 1}, {"fsdp": 4, "data": 2}
    loop.train(toy.config(mesh=one), tmp_path / "one")
    loop.train(toy.config(mesh=eight), tmp_path / "eight")
    loop.train(toy.config(mesh=eight, stop_after=5), tmp_path / "moved")
    loop.train(toy.config(mesh=one), tmp_path / "moved")
    want = losses(tmp_path / "one")
    for other in ("eight", "moved"):
        got = losses(tmp_path / other)
        assert got.keys() == want.keys()
        np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)


def test_finished_run_says_there_is_nothing_to_do(tmp_path):
    loop.train(toy.config(), tmp_path)
    ending = loop.train(toy.config(), tmp_path)
    assert ending.reason == "complete"
    assert "nothing to do" in ending.text


def test_nan_stops_keeps_the_last_good_checkpoint_and_writes_no_later_one(tmp_path):
    ending = loop.train(toy.config(nan_at=7), tmp_path)
    assert (ending.reason, ending.exit_code) == ("nan", loop.EXIT_NAN)
    assert "not finite" in ending.text
    assert "step 4" in ending.text
    params, _ = checkpoint_lib.load_params(tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert read_metrics(tmp_path, "train")[-1]["loss"] == "nan"


def test_a_nan_is_skipped_and_only_that_step_is_lost(tmp_path):
    ending = loop.train(toy.config(nan_at=6, on_nan="skip", stop_after=9), tmp_path)
    assert (ending.reason, ending.step) == ("stopped", 9)
    kept = (tmp_path / "bad_steps.jsonl").read_text()
    line = json.loads(kept)
    assert (line["step"], line["policy"]) == (7, "skip")
    assert line["clips"] == list(range(48, 56))
    assert line["metrics"]["loss"] == "nan"
    lines = {line["step"]: line for line in read_metrics(tmp_path, "train")}
    assert (lines[6]["skipped"], lines[8]["skipped"]) == (0, 1)
    assert np.isfinite(lines[9]["loss"])

    # The count goes on over a restart; one more than the limit ends the run.
    again = toy.config(nan_at=10, on_nan="skip", max_skipped=1, resume="force")
    ending = loop.train(again, tmp_path)
    assert (ending.reason, ending.exit_code) == ("nan", loop.EXIT_NAN)
    assert "on_nan=skip (max_skipped is 1)" in ending.text
    text = (tmp_path / "bad_steps.jsonl").read_text()
    assert text.startswith(kept)
    assert json.loads(text.splitlines()[1])["step"] == 11


def test_init_from_takes_weights_and_starts_at_step_0(tmp_path):
    loop.train(toy.config(steps=60), tmp_path / "a")
    trained = losses(tmp_path / "a", "eval")[60]
    loop.train(toy.config(init_from=str(tmp_path / "a")), tmp_path / "b")
    evals = losses(tmp_path / "b", "eval")
    np.testing.assert_allclose(evals[0], trained, rtol=1e-6)
    assert min(losses(tmp_path / "b")) == 1


def test_init_from_another_width_names_the_parameter(tmp_path):
    loop.train(toy.config(), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"dense/kernel: shape \(16, 16\), expected \(8, 8\)"):
        loop.train(toy.config(width=8, init_from=str(tmp_path / "a")), tmp_path / "b")


def test_resume_with_another_config_names_the_fields(tmp_path):
    loop.train(toy.config(stop_after=4), tmp_path)
    changed = {"lr": 0.01, "warmup_steps": 2, "scale_lr_by_batch": False}
    with pytest.raises(CheckpointError, match=r"config\.optimizer\.lr: 0\.05 -> 0\.01"):
        loop.train(toy.config(optimizer=changed), tmp_path)
    assert loop.train(toy.config(optimizer=changed, resume="force"), tmp_path).step == 12


def test_resume_never_refuses_a_used_workdir(tmp_path):
    loop.train(toy.config(stop_after=4), tmp_path)
    with pytest.raises(CheckpointError, match="already holds a run at step 4"):
        loop.train(toy.config(resume="never"), tmp_path)


def cut_short(step):
    for file in (step / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])


def flip_a_bit(step):
    file = max((step / "train").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def cut_short_without_checksums(step):
    (step / "checksums.json").unlink()
    cut_short(step)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_short, "CHECKPOINT 8 IS DAMAGED and is passed over: params/"),
        (flip_a_bit, "its content is not what was written (CRC-32)"),
        (cut_short_without_checksums, "checkpoint 8 cannot be read"),
    ],
)
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, damage, told):
    loop.train(toy.config(), tmp_path / "a")
    loop.train(toy.config(stop_after=8), tmp_path / "b")
    damage(tmp_path / "b" / "checkpoints" / "8")
    loop.train(toy.config(), tmp_path / "b")
    assert told in caplog.text
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write to --workdir .*file"):
        loop.train(toy.config(), tmp_path / "file")


def test_unwritable_workdir(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint_lib.tempfile, "NamedTemporaryFile", denied)
    with pytest.raises(CheckpointError, match="Permission denied"):
        loop.train(toy.config(), tmp_path)


def test_full_disk_is_said_and_the_run_ends_unsaved(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_lib.ocp.CheckpointManager, "save", full)
    ending = loop.train(toy.config(), tmp_path)
    assert (ending.reason, ending.exit_code) == ("unsaved", loop.EXIT_ERROR)
    assert "disk is full" in ending.text
    assert "checkpoint at step 4 could not be written" in caplog.text


def test_ema_follows_the_parameters(tmp_path):
    optimizer = {"lr": 0.05, "scale_lr_by_batch": False, "ema_decay": 0.5}
    loop.train(toy.config(optimizer=optimizer), tmp_path)
    params, _ = checkpoint_lib.load_params(tmp_path)
    average, _ = checkpoint_lib.load_params(tmp_path, ema=True)
    gap = np.abs(params["dense"]["kernel"] - average["dense"]["kernel"]).max()
    assert 0 < gap < 0.2


def test_frozen_parameters_do_not_move(tmp_path):
    optimizer = {"lr": 0.05, "scale_lr_by_batch": False, "freeze": ["dense/bias"]}
    loop.train(toy.config(optimizer=optimizer), tmp_path)
    params, _ = checkpoint_lib.load_params(tmp_path)
    assert not params["dense"]["bias"].any()
    assert params["dense"]["kernel"].any()


def test_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer\.freeze: pattern 'dens/.*' matches no"):
        loop.train(toy.config(optimizer={"freeze": ["dens/.*"]}), tmp_path)


def test_batch_that_does_not_divide_names_one_that_does(tmp_path):
    with pytest.raises(ConfigError, match="batch_size 6 does not divide over 8 batch shards"):
        loop.train(toy.config(batch_size=6, mesh={}), tmp_path)


def test_open_parts_of_frozen_parameters_are_trained(tmp_path):
    optimizer = {
        "lr": 0.05,
        "scale_lr_by_batch": False,
        "freeze": ["dense/.*"],
        "open": ["dense/bias"],
    }
    config = toy.config(optimizer=optimizer)
    loop.train(config, tmp_path)
    start = config.make_stage().init_params(jax.random.key(0))
    params, _ = checkpoint_lib.load_params(tmp_path)
    kernel = start["dense"]["kernel"].unbox()
    np.testing.assert_allclose(params["dense"]["kernel"], kernel, rtol=1e-6)
    assert not np.array_equal(params["dense"]["bias"], np.zeros(16))


def test_floored_schedule_is_stage_two_s():
    peak, total, warm = 5e-5, 50, 7
    schedule = optim.floored_schedule(peak, peak / 100, total, warm)
    for step in range(total + 1):
        linear, cosine = step / warm, 0.5 * (1 + np.cos(np.pi * (step - warm) / (total - warm)))
        want = peak * max(0.01, linear if step < warm else cosine)
        assert float(schedule(step)) == pytest.approx(want, rel=1e-5)


def test_starting_weights_are_checked(tmp_path):
    params = {"dense": {"kernel": jax.numpy.zeros((2, 3)), "bias": jax.numpy.zeros(3)}}
    laid = starting.lay_over(params, {"dense": {"bias": np.ones(3)}})
    assert np.array_equal(laid["dense"]["bias"], np.ones(3))
    assert laid["dense"]["kernel"] is params["dense"]["kernel"]
    with pytest.raises(CheckpointError, match="no parameter 'dense/bais'; did you mean"):
        starting.lay_over(params, {"dense": {"bais": np.ones(3)}})
    with pytest.raises(CheckpointError, match=r"dense/bias has shape \(4,\)"):
        starting.lay_over(params, {"dense": {"bias": np.ones(4)}})
