"""Mixes of conversation files and what part of each they take."""

from __future__ import annotations

import json

import numpy as np
import pytest

from iv2_jax.data.instruct import mixes
from iv2_jax.errors import DataError


def _file(path, count):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([{"QA": [{"q": str(i), "a": path.stem}]} for i in range(count)]))


def test_strategies():
    def chosen(strategy, count=10, seed=0):
        return mixes.choose(strategy, count, seed=seed).tolist()

    assert chosen("all") == list(range(10))
    assert chosen("first:3") == [0, 1, 2]
    assert chosen("end:3") == [7, 8, 9]
    assert chosen("first:25%") == [0, 1, 2]  # rounded up
    assert chosen("end:1%") == [9]
    assert len(chosen("first:16.1%", 1000)) == 161  # 161.00000000000003 is not 162
    assert chosen("first:99") == list(range(10))
    assert chosen("random:100%") == list(range(10))
    some = chosen("random:40%", 1000)
    assert len(set(some)) == 400
    assert some == sorted(some) == chosen("random:40%", 1000) != chosen("random:40%", 1000, 1)
    assert abs(np.mean(some) - 500) < 50


@pytest.mark.parametrize(
    "strategy",
    ["firs:3", "first", "first:", "end:0", "random:0%", "all:3", "first:101%", "end:2.5"],
)
def test_wrong_strategies(strategy):
    with pytest.raises(DataError, match=f"sampling_strategy '{strategy}'"):
        mixes.choose(strategy, 10, seed=0)


def test_a_mix(tmp_path, capsys):
    _file(tmp_path / "a" / "x.json", 4)
    _file(tmp_path / "y.json", 10)
    (tmp_path / "mix.yaml").write_text(
        """datasets:
  - json_path: a/x.json
    sampling_strategy: end:1
    video_read_type: decord
  - {anno_path: y.json, data_root: /data, sampling_strategy: "random:30%"}
"""
    )
    found = mixes.read_mix(tmp_path / "mix.yaml", seed=3)
    assert [c.turns[0].answer for c in found] == ["x", "y", "y", "y"]
    assert found[0].turns[0].question == "3"
    again = mixes.read_mix(tmp_path / "mix.yaml", seed=3)
    assert again == found != mixes.read_mix(tmp_path / "mix.yaml", seed=4)
    assert "y.json: 3 of 10 conversations (random:30%)" in capsys.readouterr().err
    assert len(mixes.read_mix(tmp_path / "y.json")) == 10
    parts = mixes.load_mix(tmp_path / "mix.yaml")
    assert parts[1].root == "/data"
    assert parts[0].path == str(tmp_path / "a/x.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dataset: []", "`datasets` is missing"),
        ("datasets: []", "datasets must be a list"),
        ("- 3", r"datasets\[0\]: must be an object"),
        ("- {jsonpath: a}", r"datasets\[0\]\.jsonpath: unknown field; did you mean 'json_path'"),
        ("- {data_root: a}", r"datasets\[0\]\.json_path is missing"),
        ("- {json_path: 3}", r"datasets\[0\]\.json_path: must be a text, is 3"),
        ("- {json_path: a, sampling_strategy: 'first:x'}", r"datasets\[0\]: sampling_strategy"),
        ("- {json_path: a, format: lava}", r"datasets\[0\]\.format; did you mean 'llava'"),
        ("a: [", "is no YAML"),
        ("- {json_path: none.json}", "none.json: cannot be read"),
    ],
)
def test_wrong_mixes(tmp_path, text, words):
    (tmp_path / "mix.yml").write_text(text)
    with pytest.raises(DataError, match=words):
        mixes.read_mix(tmp_path / "mix.yml")
