"""What keeps the 6B encoder's compile time at the 1B's: one block is compiled, however many run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from iv2_jax.models import zoo
from iv2_jax.models.video_encoder import VideoEncoder

REPO = Path(__file__).resolve().parents[2]


def _lines(name):
    """Lines of the program that goes to the compiler; the same on any machine."""
    config = zoo.get(name)
    size = config.image_size
    video = jax.ShapeDtypeStruct((1, config.num_frames, size, size, 3), jnp.float32)
    forward = jax.jit(lambda params, x: VideoEncoder(config).apply({"params": params}, x).pooled)
    return len(forward.lower(zoo.abstract_params(config), video).as_text().splitlines())


def test_the_6b_program_is_no_longer_than_the_1b():
    assert _lines("internvideo2_6b") <= 1.02 * _lines("internvideo2_1b")


def test_the_benchmark_runs_and_reports(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/compile_time.py", "--rounds", "1", "--goal", "50"]
    command += ["--models", "test_tiny", "internvideo2_small", "--frames", "4", "--json", str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ratio: wall" in done.stdout
    figures = json.loads(out.read_text())
    assert figures["ratio"]["cpu"] > 0
