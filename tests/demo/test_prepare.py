"""The clips of the demo, from whichever source."""

from __future__ import annotations

import json
import logging

import pytest

from iv2_jax.data.manifest import read_clips
from iv2_jax.data.records import Clip
from iv2_jax.demo import ale_clips, natural_clips
from iv2_jax.demo import prepare as prepare_lib
from iv2_jax.demo.footage import SEGMENTS
from iv2_jax.demo.games import GAMES
from iv2_jax.demo.natural_clips import NaturalClips
from iv2_jax.demo.prepare import prepare
from iv2_jax.errors import DataError

SMALL = {"games": GAMES[:1], "train_seeds": (0,), "test_seeds": (10,), "segments": ()}


@pytest.fixture
def fake_sources(monkeypatch):
    """Sources that write empty files at once, and count how often they are asked."""
    calls = []

    def record_clips(folder, *, games, train_seeds, test_seeds, processes):
        calls.append("record")
        folder.mkdir(parents=True, exist_ok=True)
        for split, seeds in (("train", train_seeds), ("test", test_seeds)):
            for seed in seeds:
                name = f"{games[0].rom}_{seed}"
                (folder / f"{name}.mp4").touch()
                yield [Clip(name, f"ale/{name}.mp4", split=split, labels={"game": games[0].rom})]

    def cut_clips(folder, segments):
        calls.append("cut")
        return NaturalClips((), ("some-package: some.mp4",) if segments else ())

    monkeypatch.setattr(ale_clips, "record_clips", record_clips)
    monkeypatch.setattr(natural_clips, "cut_clips", cut_clips)
    monkeypatch.setattr(prepare_lib.importlib.util, "find_spec", lambda name: object())
    return calls


def test_records_real_clips(tmp_path):
    pytest.importorskip("ale_py", reason="needs ale-py")
    prepared = prepare(tmp_path, **SMALL, processes=1)
    assert prepared.counts == {"train": 3, "test": 3, "recorded from games": 6}
    assert "6 clips recorded from 1 Atari games with ale-py" in prepared.source
    clips = read_clips(prepared.manifest)
    assert len(clips) == 6
    assert {c.split for c in clips} == {"train", "test"}
    assert {c.labels["action"] for c in clips} == {"none", "left", "right"}
    assert all(set(c.captions) == {"video", "audio"} and c.qa and c.audio for c in clips)
    groups = {split: {c.group for c in clips if c.split == split} for split in ("train", "test")}
    assert not groups["train"] & groups["test"]


def test_a_finished_set_is_used_again(tmp_path, fake_sources):
    first = prepare(tmp_path, **SMALL)
    assert prepare(tmp_path, **SMALL) == first
    assert fake_sources == ["record", "cut"]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("damage", ["other settings", "lost clip", "lost manifest", "bad receipt"])
def test_anything_else_is_done_again(tmp_path, fake_sources, damage):
    prepare(tmp_path, **SMALL)
    settings = SMALL
    match damage:
        case "other settings":
            settings = SMALL | {"train_seeds": (1,)}
        case "lost clip":
            next((tmp_path / "ale").iterdir()).unlink()
        case "lost manifest":
            (tmp_path / "manifest.jsonl").unlink()
        case "bad receipt":
            (tmp_path / "prepared.json").write_text("{")
    prepared = prepare(tmp_path, **settings)
    assert fake_sources.count("record") == 2
    assert len(read_clips(prepared.manifest)) == 2


def test_a_set_that_was_not_finished_is_done_again(tmp_path, fake_sources, monkeypatch):
    def stops(*args, **kwargs):
        raise KeyboardInterrupt

    prepare(tmp_path, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(natural_clips, "cut_clips", stops)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, **SMALL | {"train_seeds": (1,)})
    prepare(tmp_path, **SMALL | {"train_seeds": (1,)})
    assert fake_sources.count("record") == 3


def test_missing_packages_are_said(tmp_path, fake_sources, caplog):
    with caplog.at_level(logging.INFO):
        prepare(tmp_path, **SMALL | {"segments": SEGMENTS[:1]})
    assert "not installed, so left out: some-package: some.mp4" in caplog.text
    assert "1 train, 1 test, 2 recorded from games" in caplog.text


def test_nothing_installed_is_an_error_and_no_made_up_clips(tmp_path, fake_sources, monkeypatch):
    monkeypatch.setattr(prepare_lib.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install ale-py, or give your own with --data"):
        prepare(tmp_path, **SMALL)
    assert not (tmp_path / "manifest.jsonl").exists()


def own_manifest(folder, splits):
    lines = []
    for i, split in enumerate(splits):
        (folder / f"{i}.mp4").touch()
        lines.append(json.dumps({"path": f"{i}.mp4", "split": split}))
    path = folder / "mine.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_users_manifest_is_used_as_it_is(tmp_path):
    path = own_manifest(tmp_path, ["train", "train", "test", "val"])
    prepared = prepare(tmp_path / "out", data=str(path))
    assert prepared.manifest == path
    assert prepared.counts == {"train": 2, "test": 1, "in other splits, not used": 1}
    assert str(path) in prepared.source
    assert not (tmp_path / "out").exists()


def test_a_users_manifest_needs_both_splits(tmp_path):
    with pytest.raises(DataError, match=r"mine\.jsonl: no clip has split 'test'"):
        prepare(tmp_path, data=str(own_manifest(tmp_path, ["train"])))


def test_a_users_bad_manifest_is_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"path": 3}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: path"):
        prepare(tmp_path, data=str(tmp_path / "bad.jsonl"))
