"""What the loop does beside the steps: it takes little, and the devices do not wait for it."""

from __future__ import annotations

import statistics
import threading
import time

import jax
import numpy as np
import pytest

from iv2_jax.parallel.mesh import make_mesh
from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train import loop
from iv2_jax.train.metrics import read_metrics
from iv2_jax.train.program import Program, build_program
from tests.train import toy


@pytest.fixture
def dispatched(monkeypatch):
    """The order of dispatched steps ("step") and fetched metrics (their step's number)."""
    events = []
    compile_steps, report = Program.compile_steps, loop._Loop.report

    def compile_and_note(self):
        def noted(step):
            def run(*args):
                events.append("step")
                return step(*args)

            return run

        return {kind: noted(step) for kind, step in compile_steps(self).items()}

    def note(self, done, stop):
        events.append(done.step)
        return report(self, done, stop)

    monkeypatch.setattr(Program, "compile_steps", compile_and_note)
    monkeypatch.setattr(loop._Loop, "report", note)
    return events


def test_metrics_are_fetched_while_the_next_step_runs(tmp_path, dispatched):
    loop.train(toy.config(steps=5, checkpoint={"every": 0}), tmp_path)
    assert dispatched == ["step", "step", 1, "step", 2, "step", 3, "step", 4, 5]


def test_a_step_that_is_saved_is_looked_at_before(tmp_path, dispatched):
    loop.train(toy.config(steps=4, checkpoint={"every": 2}), tmp_path)
    assert dispatched == ["step", "step", 1, 2, "step", "step", 3, 4]


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The write of step 4 ends only once step 7 is reported: a loop that waits for it hangs."""
    write, report = checkpoint_lib.checksums.write, loop._Loop.report
    reached, waited = threading.Event(), []

    def slow(folder):
        waited.append(reached.wait(timeout=60))
        return write(folder)

    def note(self, done, stop):
        if done.step == 7:
            assert not (tmp_path / "checkpoints" / "4").exists()  # still being written
            reached.set()
        return report(self, done, stop)

    monkeypatch.setattr(checkpoint_lib.checksums, "write", slow)
    monkeypatch.setattr(loop._Loop, "report", note)
    assert loop.train(toy.config(), tmp_path).reason == "complete"
    assert all(waited)


def test_the_loop_takes_less_than_a_hundredth_of_a_step_of_half_a_second(tmp_path, monkeypatch):
    """CPU time of the loop's own thread, which other processes do not disturb."""
    marks = []
    original = toy.ToyStage._batch

    def batch(self, step):
        marks.append(time.thread_time())
        return original(self, step)

    monkeypatch.setattr(toy.ToyStage, "_batch", batch)
    loop.train(toy.config(steps=60, checkpoint={"every": 0}, tensorboard=True), tmp_path)
    assert len(read_metrics(tmp_path, "train")) == 60
    assert statistics.median(np.diff(marks[1:])) < 0.01 * 0.5


def test_a_checkpoint_restored_on_other_meshes_is_equal_bit_for_bit(tmp_path):
    optimizer = {"lr": 0.05, "scale_lr_by_batch": False, "ema_decay": 0.9}
    written = {"data": 2, "fsdp": 4}
    loop.train(toy.config(optimizer=optimizer, mesh=written, stop_after=5), tmp_path)
    params, _ = checkpoint_lib.load_params(tmp_path)
    average, _ = checkpoint_lib.load_params(tmp_path, ema=True)
    states = []
    for mesh in (written, {"max_devices": 1}, {"data": 1, "fsdp": 8}, {"data": 8, "fsdp": 1}):
        config = toy.config(optimizer=optimizer, mesh=mesh)
        program = build_program(config, config.make_stage(), make_mesh(config.mesh))
        checkpointer = checkpoint_lib.Checkpointer(tmp_path, config.checkpoint)
        state, data, _ = checkpointer.restore(program.abstract_state)
        checkpointer.close()
        assert data["next_batch"] == int(state.step) == 5
        kernel = state.params["dense"]["kernel"]
        assert kernel.sharding == program.abstract_state.params["dense"]["kernel"].sharding
        states.append(jax.device_get(state))
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, states[0])
    jax.tree.map(np.testing.assert_array_equal, states[0].params, params)
    jax.tree.map(np.testing.assert_array_equal, states[0].ema, average)
    moments = [x for x in jax.tree.leaves(states[0].opt_state) if np.ndim(x) == 2]
    assert moments
    assert all(np.any(x) for x in moments)
