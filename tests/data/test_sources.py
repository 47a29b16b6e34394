"""Sources: files, folders of frames, URLs; what travels to a worker."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from iv2_jax.data import sources
from iv2_jax.data.decode import DecodeError
from iv2_jax.data.records import Clip
from iv2_jax.errors import DataError
from tests.data import clips


def _frame_folder(folder, count=12):
    folder.mkdir()
    for i in range(1, count + 1):  # no leading zeros: 10 must not come before 2
        Image.fromarray(clips.picture(i)).save(folder / f"img_{i}.png")
    (folder / "notes.txt").touch()
    return folder


def _numbers(frames, indices):
    try:
        return clips.numbers(frames.read(indices))
    finally:
        frames.close()


def test_a_manifest_becomes_a_source(tmp_path):
    source = sources.open_source(clips.write_list(tmp_path, count=3))
    assert len(source) == 3
    assert [clip.id for clip in source.clips] == ["c0", "c1", "c2"]
    assert _numbers(source.open(2), [0, 5]) == [32, 37]


def test_workers_get_paths_and_times_but_no_records(tmp_path):
    clips.write_clip(tmp_path / "ä.mp4", 50)
    records = [Clip("x", str(tmp_path / "ä.mp4"), captions={"video": ("long " * 999,)})] * 3
    records.append(Clip("y", str(tmp_path / "ä.mp4"), start=1.0, end=1.2))
    data = pickle.dumps(sources.FileSource(records))
    assert len(data) < 2000
    copy = pickle.loads(data)
    assert len(copy) == 4
    assert [copy.name(i) for i in (0, 3)] == [str(tmp_path / "ä.mp4")] * 2
    assert _numbers(copy.open(0), [0]) == [0]
    assert _numbers(copy.open(3), range(5)) == [25, 26, 27, 28, 29]


def test_folders_of_frames(tmp_path):
    path = str(_frame_folder(tmp_path / "f"))
    assert _numbers(sources.open_frames(path), range(12)) == list(range(1, 13))
    assert len(sources.open_frames(path, frames=7)) == 7
    with pytest.raises(DecodeError, match="holds 12 pictures, the list says 13"):
        sources.open_frames(path, frames=13)
    with pytest.raises(DecodeError, match="no seconds to cut at"):
        sources.open_frames(path, start=1.0)
    with pytest.raises(IndexError):
        sources.open_frames(path).read([12])


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(DecodeError, match="holds no pictures"):
        sources.open_frames(str(tmp_path / "none"))
    folder = _frame_folder(tmp_path / "f", 3)
    (folder / "img_2.png").write_bytes(b"nothing")
    frames = sources.open_frames(str(folder))
    with pytest.raises(DecodeError, match=r"img_2\.png: is not a readable picture"):
        frames.read([0, 1])


def test_pictures_of_other_sizes_follow_the_first(tmp_path):
    folder = _frame_folder(tmp_path / "f", 2)
    Image.fromarray(clips.picture(2, 128, 96)).save(folder / "img_2.png")
    frames = sources.open_frames(str(folder)).read([0, 1])
    assert frames.shape == (2, clips.HEIGHT, clips.WIDTH, 3)


def test_urls_go_through_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    content = clips.write_clip(tmp_path / "a.mp4", 6).read_bytes()
    with fsspec.open("memory://bucket/a.mp4", "wb") as file:
        file.write(content)
    assert _numbers(sources.open_frames("memory://bucket/a.mp4"), [4]) == [4]
    with pytest.raises(DecodeError, match=r"memory://bucket/b\.mp4: does not exist"):
        sources.open_frames("memory://bucket/b.mp4")
    with pytest.raises(DecodeError, match="cannot be read"):
        sources.open_frames("nosuchscheme://b/a.mp4")


def test_missing_source(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        sources.open_source(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no"):
        sources.open_source(tmp_path)


def test_missing_files_are_named_when_opened(tmp_path):
    path = clips.write_manifest(tmp_path / "m.jsonl", [{"path": "gone.mp4"}])
    source = sources.open_source(path)
    with pytest.raises(DecodeError, match=r"gone\.mp4: does not exist"):
        source.open(0)


def test_read_returns_what_was_asked_in_that_order(tmp_path):
    frames = sources.open_frames(str(_frame_folder(tmp_path / "f")))
    assert clips.numbers(frames.read(np.array([5, 0, 5]))) == [6, 1, 6]


def test_a_url_is_loaded_once_for_pictures_and_sound(tmp_path, monkeypatch):
    data = clips.write_clip(tmp_path / "a.mp4", 5, audio=True).read_bytes()
    loaded = []
    monkeypatch.setattr(sources, "read_bytes", lambda path: loaded.append(path) or data)
    source = sources.FileSource([Clip("a", "memory://a.mp4"), Clip("b", "memory://b.mp4")])
    for index in (0, 1, 0):
        assert len(source.open(index)) == 5
        assert source.sound(index).source == data
    assert loaded == ["memory://a.mp4", "memory://b.mp4", "memory://a.mp4"]
