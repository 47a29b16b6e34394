"""`iv2 data validate`, `build` and `bench`."""

from __future__ import annotations

import argparse
import json

import pytest

from iv2_jax.data import bench, commands
from iv2_jax.errors import ConfigError, DataError
from tests.data import clips


def _run(*words):
    parser = argparse.ArgumentParser(prog="iv2 data")
    commands.add_arguments(parser)
    return commands.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def mixed(tmp_path):
    """Good clips among every kind of bad line."""
    clips.write_clip(tmp_path / "a.mp4", 12, audio=True)
    clips.write_clip(tmp_path / "b.mp4", 30)
    (tmp_path / "empty.mp4").touch()
    clips.write_sound(tmp_path / "sound.m4a")
    return clips.write_manifest(
        tmp_path / "m.jsonl",
        [
            {"path": "a.mp4", "split": "train", "label": "x", "captions": "hum", "audio": False},
            {"path": "gone.mp4"},
            {"path": "empty.mp4"},
            {"path": "b.mp4", "start": "soon"},
            {"path": "sound.m4a"},
            {"path": "b.mp4", "start": 0.2, "end": 0.6, "split": "test"},
            {"path": "b.mp4", "start": 7},
        ],
    )


@pytest.mark.parametrize("quick", [False, True])
def test_validate_names_every_problem(mixed, capsys, quick, tmp_path):
    report = tmp_path / "report.json"
    options = ["--quick"] if quick else []
    assert _run("validate", mixed, "--json", report, *options) == 1
    out = capsys.readouterr().out
    for line, words in {
        2: "path: ",
        3: "path: ",
        4: "start: must be a number of seconds",
        5: "path: ",
        7: "path: ",
    }.items():
        assert f"{mixed}:{line}: {words}" in out
    for words in ("does not exist", "zero bytes", "no video stream", "ends before the clip"):
        assert words in out
    assert f"{mixed}:1: audio: " in out
    assert "promises silence, there is sound (odd, but usable)" in out
    assert "2 of 6 clips are good, 5 problems" in out
    assert "frames a clip: 10 to 12" in out
    assert "splits: none 4, train 1, test 1" in out
    found = json.loads(report.read_text())
    assert [p["line"] for p in found["problems"]] == [2, 3, 4, 5, 7]


def test_validate_decodes_everything_unless_quick(tmp_path):
    path = clips.write_clip(tmp_path / "a.mp4", 60, options={"bf": "0"})
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 200] = bytes([255]) * 200
    path.write_bytes(bytes(damaged))
    manifest = clips.write_manifest(tmp_path / "m.jsonl", [{"path": "a.mp4"}])
    assert _run("validate", manifest, "--quick") == 0
    assert _run("validate", manifest) == 1


def test_validate_good_manifest(tmp_path, capsys):
    manifest = clips.write_list(tmp_path, count=3)
    assert _run("validate", manifest, "--threads", 1) == 0
    out = capsys.readouterr().out
    assert "3 of 3 clips are good, 0 problems" in out
    assert "36 frames" in out
    assert "labels: label (3 values)" in out


def test_validate_empty_list(tmp_path, capsys):
    path = tmp_path / "m.json"
    path.write_text("[]")
    assert _run("validate", path) == 1
    assert "the list is empty" in capsys.readouterr().out


def test_build_then_bench(tmp_path, capsys):
    manifest = clips.write_list(tmp_path / "list", count=4)
    folder, figures = tmp_path / "packed", tmp_path / "f.json"
    assert _run("build", manifest, folder, "--gop", 4, "--split", "train") == 0
    assert "4 of 4 clips" in capsys.readouterr().out
    with pytest.raises(DataError, match="already exists"):
        _run("build", manifest, folder)
    options = ["--workers", "1", "--seconds", "0.2", "--frames", "4", "--size", "32"]
    words = ["--target", 50, "--json", figures, "--batch", 2, *options]
    assert _run("bench", manifest, folder, *words) == 0
    out = capsys.readouterr().out
    assert "decode" in out
    assert "videos sought" in out
    assert "times cheaper" in out
    assert "50 clips/s need about" in out
    found = json.loads(figures.read_text())
    assert found["clip_ms"]["decode_ms"] > 0
    assert [m["workers"] for m in found["throughput"]] == [1]
    assert found["throughput"][0]["clips_per_second"] > 0
    assert found["throughput"][0]["worker_mib"] > 1
    assert [other["source"] for other in found["others"]] == [str(folder)]
    assert found["others"][0]["clip_ms"]["reads"]["fallbacks"] == 0


def test_bench_shows_the_memory_of_a_worker(tmp_path, capsys):
    manifest, figures = clips.write_list(tmp_path, count=2), tmp_path / "f.json"
    options = ["--frames", 4, "--size", 32, "--batch", 2, "--json", figures]
    assert _run("bench", manifest, "--memory", 40, *options) == 0
    assert "growth" in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert [p["clips"] for p in found["memory"]] == list(range(2, 41, 2))


def test_build_says_what_was_left_out(mixed, tmp_path, capsys):
    records = [json.loads(line) for line in mixed.read_text().splitlines()]
    good = clips.write_manifest(mixed.parent / "n.jsonl", [records[i] for i in (0, 1, 5)])
    assert _run("build", good, tmp_path / "packed", "--max-bad-share", 0.5) == 0
    captured = capsys.readouterr()
    assert "left out: " in captured.err
    assert "gone.mp4: does not exist" in captured.err


def test_cores_for_a_target():
    measured = [bench.Throughput(1, 20.0), bench.Throughput(4, 60.0)]
    assert bench.cores_for(100, measured) == 7


def test_bad_arguments(tmp_path):
    manifest = clips.write_list(tmp_path, count=1)
    for workers in ("two", "0"):
        with pytest.raises(ConfigError, match="--workers must be"):
            _run("bench", manifest, "--workers", workers)
    with pytest.raises(SystemExit):
        _run("frobnicate")


def test_help_has_examples(capsys):
    for words in (["--help"], ["validate", "--help"], ["build", "--help"], ["bench", "--help"]):
        with pytest.raises(SystemExit) as caught:
            _run(*words)
        assert caught.value.code == 0
        assert "example" in capsys.readouterr().out
