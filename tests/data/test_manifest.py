"""Manifests: every format gives the same record, every mistake its file, line and field."""

from __future__ import annotations

import json

import pytest

from iv2_jax.data.manifest import Problem, iter_clips, read_clips
from iv2_jax.data.records import Clip
from iv2_jax.errors import DataError
from tests.data import clips


def _write(folder, text, name="list.jsonl"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_field_of_jsonl(tmp_path):
    path = clips.write_manifest(
        tmp_path / "m.jsonl",
        [
            {
                "id": 7,
                "path": "a.mp4",
                "start": 1,
                "end": 2.5,
                "captions": {"video": ["one", "two"], "audio": "a hum"},
                "labels": {"topic": "dogs", "class": 3},
                "qa": [["what?", "that"], {"question": "who?", "answer": "she"}],
                "split": "train",
                "group": "g",
                "audio": True,
                "fps": 25,
            },
            {"path": "/b.mp4", "captions": "short", "label": 4},
            {"path": "gs://bucket/c.mp4", "captions": ["x"]},
        ],
    )
    first, second, third = read_clips(path)
    assert first == Clip(
        id="7",
        path=str(tmp_path / "a.mp4"),
        start=1.0,
        end=2.5,
        captions={"video": ("one", "two"), "audio": ("a hum",)},
        labels={"topic": "dogs", "class": 3},
        qa=(("what?", "that"), ("who?", "she")),
        split="train",
        group="g",
        audio=True,
    )
    assert (second.id, second.path, second.labels) == ("/b.mp4", "/b.mp4", {"label": 4})
    assert second.captions == {"video": ("short",)}
    assert third.path == "gs://bucket/c.mp4"
    again = clips.write_manifest(tmp_path / "n.jsonl", [c.to_json() for c in (first, second)])
    assert read_clips(again) == [first, second]


def test_blank_lines_and_byte_order_mark(tmp_path):
    path = _write(tmp_path, '\ufeff\n{"path": "a.mp4"}\n\n{"path": "b.mp4"}\n')
    assert [clip.id for clip in read_clips(path)] == ["a.mp4", "b.mp4"]


def test_json_list_of_the_pack(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "x.mp4").touch()
    record = {
        "id": "x",
        "file": "clips/x.mp4",  # from the folder above the manifest
        "topic": "sport",
        "action": "rowing",
        "captions": ["A boat.", "Two boats."],
        "qa": [{"question": "q", "answer": "a"}],
        "split": "test",
        "transcript": "ahoy",
        "audio": False,
        "frames": 280,
        "source": {"repo": "r"},
    }
    path = _write(folder, json.dumps([record], indent=1), "annotations.json")
    (clip,) = read_clips(path, split="test")
    assert clip.path == str(folder / "x.mp4")
    assert clip.labels == {"topic": "sport", "action": "rowing"}
    assert clip.captions == {"video": ("A boat.", "Two boats."), "speech": ("ahoy",)}
    assert clip.audio is False
    assert clip.frames is None


def test_the_pack_itself(shared_dir):
    path = shared_dir / "data" / "clips" / "annotations.json"
    train, test = (read_clips(path, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (103, 34)
    from pathlib import Path

    assert all(Path(clip.path).is_file() for clip in train + test)


@pytest.mark.parametrize(
    ("format", "line", "expected"),
    [
        ("pretrain", "k710 v/a.mp4 10.0 -1 -1 0", {"path": "v/a.mp4", "label": 0}),
        (
            "pretrain",
            "web a.mp4 300.5 12.5 20 -1",
            {"path": "a.mp4", "label": -1, "start": 12.5, "end": 20.0},
        ),
        ("kinetics", "a.mp4 399", {"path": "a.mp4", "label": 399}),
        ("kinetics", "a b.mp4,3", {"path": "a b.mp4", "label": 3}),
        ("frames", "20bn/123 45 17", {"path": "20bn/123", "label": 17, "frames": 45}),
        (
            "interval",
            "v.mp4 60.0 1.5 9 12",
            {"path": "v.mp4", "label": 12, "start": 1.5, "end": 9.0},
        ),
    ],
)
@pytest.mark.parametrize("told", [True, False], ids=["format given", "detected"])
def test_lists_of_the_released_code(tmp_path, format, line, expected, told):
    path = _write(tmp_path, f"{line}\n{line}\n", "train.csv")
    read = read_clips(path, format=format if told else "auto", prefix="/data")
    for clip in read:
        assert clip.path == f"/data/{expected['path']}"
        assert clip.labels == {"label": expected["label"]}
        assert (clip.start, clip.end) == (expected.get("start"), expected.get("end"))
        assert clip.frames == expected.get("frames")
    assert len({clip.id for clip in read}) == 2  # listed twice, told apart


def test_separator_of_ones_own(tmp_path):
    path = _write(tmp_path, "a, b c.mp4|3\n", "l.txt")
    (clip,) = read_clips(path, format="kinetics", separator="|")
    assert clip.path == str(tmp_path / "a, b c.mp4")


@pytest.mark.parametrize("text", ["a.mp4\nb.mp4\n", "a b.mp4 3 4 5 6 7\n", "a.mp4 dog\n"])
def test_unclear_lists_are_refused(tmp_path, text):
    path = _write(tmp_path, text, "l.txt")
    with pytest.raises(DataError, match=r"l\.txt: cannot tell the format.*format="):
        read_clips(path)


@pytest.mark.parametrize(
    ("format", "line", "words"),
    [
        ("kinetics", "a.mp4 dog", "label: must be a whole number, is 'dog'"),
        ("kinetics", "a.mp4 1 2", "has 3 columns split at space"),
        ("pretrain", "s a.mp4 ten -1 -1 0", "total: must be a number of seconds"),
        ("pretrain", "s a.mp4 9 5 5 0", "end: must be later than start"),
        ("pretrain", "s a.mp4 9 -1 5 0", "start: start and end are -1 together"),
        ("frames", "f 0 1", "n_frames: must be at least 1"),
        ("interval", ",1,2,3,4", "path: is empty"),
    ],
)
def test_bad_lines_of_lists(tmp_path, format, line, words):
    separator = "," if "," in line else " "
    good = {"kinetics": "g.mp4 1", "frames": "g 5 1", "interval": "g.mp4,9,1,2,3"}
    first = good.get(format, "s g.mp4 9 -1 -1 0")
    path = _write(tmp_path, f"{first}\n{line}\n", "l.csv")
    with pytest.raises(DataError) as caught:
        read_clips(path, format=format, separator=separator)
    assert f"{path}:2:" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "path: must be a non-empty text, is null"),
        ({"path": ""}, "path: must be a non-empty text"),
        ({"path": 5}, "path: must be a non-empty text, is 5"),
        ({"path": "a", "start": "1s"}, "start: must be a number of seconds"),
        ({"path": "a", "start": -2}, "start: must be a number of seconds"),
        ({"path": "a", "start": True}, "start: must be a number of seconds"),
        ({"path": "a", "start": 5, "end": 5}, "end: must be later than start (5.0 s)"),
        ({"path": "a", "captions": {"video": 3}}, "captions.video: must be a text or a list"),
        ({"path": "a", "captions": [1]}, "captions: must be a text or a list"),
        ({"path": "a", "label": 1.5}, "label: must be a text or a whole number"),
        ({"path": "a", "labels": ["x"]}, "labels: must be an object"),
        ({"path": "a", "labels": {"t": None}}, "labels.t: must be a text"),
        ({"path": "a", "qa": [["q"]]}, "qa[0]: must be [question, answer]"),
        ({"path": "a", "qa": {"q": "a"}}, "qa: must be a list"),
        ({"path": "a", "audio": "yes"}, "audio: must be true or false"),
        ({"path": "a", "split": 1}, "split: must be a text"),
        ({"path": "a", "id": 1.5}, "id: must be a text or a whole number"),
        ({"path": "a", "caption": "x"}, "caption: unknown field; did you mean 'captions'?"),
        ({"path": "a", "id": "good"}, "id: 'good' is already used in line 1"),
        ([1], "must be a JSON object"),
    ],
)
def test_bad_records(tmp_path, record, words):
    path = clips.write_manifest(tmp_path / "m.jsonl", [{"path": "g.mp4", "id": "good"}, record])
    with pytest.raises(DataError) as caught:
        read_clips(path)
    assert f"{path}:2:" in str(caught.value)
    assert words in str(caught.value)


def test_syntax_errors_name_their_line(tmp_path):
    path = _write(tmp_path, '{"path": "a"}\n{"path": "b",}\n')
    with pytest.raises(DataError, match=r"list\.jsonl:2: not JSON"):
        read_clips(path)
    path = _write(tmp_path, '[\n{"path": "a"},\n{"path": "b"}\n{"path": "c"}]', "l.json")
    with pytest.raises(DataError, match=r"l\.json:3: not JSON: ',' or '\]' is missing"):
        read_clips(path)
    path = _write(tmp_path, '[\n{"path": "a"},\n{"path": 3}]', "l.json")
    with pytest.raises(DataError, match=r"l\.json:3: path: must be"):
        read_clips(path)


def test_all_problems_are_listed(tmp_path):
    path = clips.write_manifest(tmp_path / "m.jsonl", [{}, {"path": "a"}, {"path": "b", "qa": 1}])
    problems = [item for item in iter_clips(path) if isinstance(item, Problem)]
    assert [(p.line, p.field) for p in problems] == [(1, "path"), (3, "qa")]


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_empty_lists(tmp_path, text):
    with pytest.raises(DataError, match="the list is empty"):
        read_clips(_write(tmp_path, text))


def test_unreadable_manifests(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_clips(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_clips(tmp_path)
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00video")
    with pytest.raises(DataError, match="not UTF-8"):
        read_clips(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="did you mean 'jsonl'"):
        read_clips(_write(tmp_path, "{}"), format="jsnl")


def test_splits(tmp_path):
    path = clips.write_manifest(
        tmp_path / "m.jsonl", [{"path": "a", "split": "train"}, {"path": "b", "split": "test"}]
    )
    assert [c.id for c in read_clips(path, split="test")] == ["b"]
    with pytest.raises(DataError, match="no clip has split 'tran'; did you mean 'train'"):
        read_clips(path, split="tran")
    path = clips.write_manifest(tmp_path / "n.jsonl", [{"path": "a"}])
    with pytest.raises(DataError, match="no record has a `split`"):
        read_clips(path, split="train")
