"""The decoding benchmark runs, and compares two models that say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from iv2_jax.interop import entries
from iv2_jax.interop.hf_llm import from_hf_config
from iv2_jax.interop.torch_keys.llm import llm_map
from tests.models import tiny_llm

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.torch
def test_the_benchmark_runs_and_both_say_the_same(tmp_path):
    pytest.importorskip("transformers", reason="compares with transformers")
    from safetensors.numpy import save_file

    values = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "vocab_size": 23,
    }
    config = from_hf_config(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(
        entries.to_torch(tiny_llm.params(config), llm_map(config)), tmp_path / "model.safetensors"
    )
    command = [sys.executable, "benchmarks/decode.py", "--model", str(tmp_path), "--rounds", "2"]
    command += ["--prompt-tokens", "5", "--new", "6", "--batch", "2", "--goal", "0"]
    command += ["--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the first 6 of 6 tokens are the same" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ratio"] > 0
    assert figures["iv2_jax"]["tokens_per_second"] > 0
