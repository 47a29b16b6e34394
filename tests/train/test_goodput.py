"""Where the time goes, over several starts; and traces of named steps."""

from __future__ import annotations

import json
import time

import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.train import goodput, loop, profiling
from iv2_jax.train.goodput import Attempt
from iv2_jax.train.metrics import read_metrics
from tests.train import toy


def test_time_is_counted_once(tmp_path):
    one = goodput.Goodput(tmp_path)
    with one.spent("step"):
        time.sleep(0.02)
        with one.spent("data_wait"):
            time.sleep(0.04)
    time.sleep(0.03)
    shares = one.shares()
    assert sum(shares.values()) == pytest.approx(1)
    seconds = one.attempts[-1].seconds
    assert 0.02 <= seconds["step"] < 0.04 <= seconds["data_wait"]
    assert shares["start"] > 0.2


def test_restarts_and_steps_done_twice_are_losses():
    """100 s; 40 s between two starts; the first did 10 steps, of which 4 were lost."""
    first = Attempt(0.0, 30.0, 0, 10, {"step": 20.0, "data_wait": 5.0, "compile": 5.0})
    second = Attempt(70.0, 100.0, 6, 20, {"step": 25.0, "checkpoint": 5.0})
    shares = goodput.shares([first, second])
    assert shares["step"] == pytest.approx((20 * 0.6 + 25) / 100)
    assert shares["data_wait"] == pytest.approx(0.03)
    assert shares["checkpoint"] == shares["compile"] == pytest.approx(0.05)
    assert shares["start"] == pytest.approx(1 - 0.37 - 0.03 - 0.1)


def test_a_run_tells_its_goodput_and_traces_steps(tmp_path, caplog):
    caplog.set_level("INFO", "iv2_jax")
    loop.train(toy.config(stop_after=5), tmp_path, profile=((2, 3),))
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert b"train" in traces[0].read_bytes()
    assert "profiled steps 2 to 3" in caplog.text
    loop.train(toy.config(), tmp_path, profile=((1, 2), (11, 40)))
    assert "steps 1 to 2 were done before" in caplog.text
    assert "profiled steps 11 from 11" not in caplog.text
    assert "from 11 on, cut short" in caplog.text
    line = caplog.records[-2].message
    assert line.startswith("goodput ")
    assert "2 starts, 0 steps done twice" in line
    attempts = json.loads((tmp_path / goodput.FILE).read_text())
    assert [(a["first_step"], a["last_step"]) for a in attempts] == [(0, 5), (5, 12)]
    last = read_metrics(tmp_path, "train")[-1]
    assert 0 < last["goodput"] < 1


def test_a_damaged_file_costs_only_figures(tmp_path):
    (tmp_path / goodput.FILE).write_text('[{"started": 1')
    assert len(goodput.Goodput(tmp_path).attempts) == 1


def test_steps_to_profile():
    assert profiling.read_steps("") == ()
    assert profiling.read_steps("20,30:32") == ((20, 20), (30, 32))
    for bad in ("x", "5:2", "0", "10:20,15:30"):
        with pytest.raises(ConfigError, match="--profile"):
            profiling.read_steps(bad)
