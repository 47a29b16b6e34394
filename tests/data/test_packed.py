"""Packed data sets: what goes in comes out, through our loader and through TFDS."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from iv2_jax.data import audio, manifest, sources
from iv2_jax.data.builders import encode, packed
from iv2_jax.data.decode import DecodeError, VideoReader
from iv2_jax.data.pipeline import DataConfig, make_loader
from iv2_jax.data.records import Clip
from iv2_jax.errors import DataError
from tests.data import clips, multimodal


@pytest.fixture
def records(tmp_path):
    """Three clips: plain, cut out of the middle, and with sound."""
    clips.write_clip(tmp_path / "a.mp4", range(20))
    clips.write_clip(tmp_path / "b.mp4", range(50, 100))
    clips.write_clip(tmp_path / "c.mp4", range(100, 125), audio=True)
    return [
        Clip(
            "a",
            str(tmp_path / "a.mp4"),
            captions={"video": ("Grüße", "two"), "audio": ("hum",)},
            labels={"topic": "dogs", "class": 3},
            qa=(("q1", "a1"), ("q2", "a2")),
            split="train",
            group="g",
            audio=False,
        ),
        Clip("b", str(tmp_path / "b.mp4"), start=0.4, end=1.2, split="test"),
        Clip("c", str(tmp_path / "c.mp4"), split="train"),
    ]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "packed"


def _numbers(source, index):
    frames = source.open(index)
    try:
        return clips.numbers(frames.read(range(len(frames))))
    finally:
        frames.close()


def test_records_and_frames_come_back(records, folder):
    report = packed.build(records, folder, packed.PackOptions(shard_bytes=1))
    assert (report.clips, report.shards, report.left_out) == (3, {"test": 1, "train": 2}, [])
    source = sources.open_source(folder)
    assert list(source.clips) == [records[1], records[0], records[2]]  # split by split
    assert _numbers(source, 0) == list(range(60, 80))
    assert _numbers(source, 1) == list(range(20))
    assert "b.mp4" in source.name(0)
    worker = pickle.loads(pickle.dumps(source))
    assert len(worker) == 3
    assert _numbers(worker, 2) == list(range(100, 125))
    assert source.read_bytes(1) == (folder.parent / "a.mp4").read_bytes()
    train = sources.open_source(folder, split="train")
    assert [clip.id for clip in train.clips] == ["a", "c"]
    assert _numbers(train, 1) == list(range(100, 125))


def test_without_our_index_the_examples_are_read(records, folder):
    packed.build(records, folder)
    (folder / sources.PACKED_INDEX).unlink()
    found = sources.open_source(folder).clips
    assert [c.id for c in found] == ["b", "a", "c"]
    assert found[1] == records[0]
    assert found[0].end == pytest.approx(1.2, rel=1e-6)


def test_tfds_reads_it_without_tensorflow(records, folder):
    packed.build(records, folder)
    code = f"""
import sys, tensorflow_datasets as tfds
builder = tfds.builder_from_directory({str(folder)!r})
data = builder.as_data_source(split="train")
assert len(data) == 2 and builder.info.splits["test"].num_examples == 1
second, first = data[1], data[0]
assert (first["id"], second["id"]) == (b"a", b"c"), (first["id"], second["id"])
assert first["video"] == open({records[0].path!r}, "rb").read()
assert [t.decode() for t in first["captions"]["text"]] == ["Grüße", "two", "hum"]
assert list(first["labels"]["value"]) == [b"dogs", b"3"], first["labels"]
assert list(first["qa"]["answer"]) == [b"a1", b"a2"]
assert second["audio"] == -1 and list(second["captions"]["text"]) == []
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_bytes_with_trailing_zeros_survive(tmp_path, folder):
    path = clips.write_clip(tmp_path / "a.mp4", 8)
    path.write_bytes(path.read_bytes() + bytes(7))
    packed.build([Clip("a", str(path))], folder)
    assert sources.open_source(folder).read_bytes(0) == path.read_bytes()
    import tensorflow_datasets as tfds

    data = tfds.builder_from_directory(folder).as_data_source(split="train")
    assert data[0]["video"] == path.read_bytes()


def test_loader_gives_the_same_rows_as_from_the_files(tmp_path):
    path = clips.write_list(tmp_path / "list")
    packed.build(manifest.read_clips(path), tmp_path / "packed", packed.PackOptions(shard_bytes=1))
    rows = []
    for source, workers in ((path, 0), (tmp_path / "packed", 0), (tmp_path / "packed", 1)):
        config = DataConfig(source=str(source), num_frames=4, size=32, num_workers=workers)
        with make_loader(config, seed=0, global_batch=4, num_steps=3) as loader:
            rows.append(np.concatenate([batch["video"] for batch in loader]))
    np.testing.assert_array_equal(rows[1], rows[0])
    np.testing.assert_array_equal(rows[2], rows[0])


def test_encoding_anew(records, folder):
    clips.write_clip(folder.parent / "a.mp4", range(20), size=(128, 96))
    options = packed.PackOptions(short_side=48, gop=5)
    packed.build(records, folder, options)
    source = sources.open_source(folder, split="train")
    frames = source.open(0)
    assert frames.read([0]).shape == (1, 48, 64, 3)
    assert np.diff(frames._table.keys).max() <= 5
    frames.close()
    assert _numbers(source, 0) == list(range(20))
    with VideoReader(source.read_bytes(1)) as reader:
        assert reader.has_audio
    silent = encode.encode_clip(records[2], keep_audio=False)
    with VideoReader(silent) as reader:
        assert not reader.has_audio


def test_cut_keeps_times_and_turns_pictures_upright(tmp_path):
    times = [0.0, 0.1, 0.5, 0.6, 2.0, 2.1]
    path = clips.write_clip(tmp_path / "v.mp4", 6, times=times, rotation=90)
    video = encode.encode_clip(Clip("v", str(path), start=0.5, end=2.05))
    with VideoReader(video) as reader:
        assert clips.numbers(reader.read(range(len(reader)))) == [2, 3, 4]
        np.testing.assert_allclose(reader.timestamps, [0.0, 0.1, 1.5], atol=2e-3)
        assert reader.read([0]).shape == (1, clips.HEIGHT, clips.WIDTH, 3)


def test_cut_sound(tmp_path):
    path = clips.write_clip(tmp_path / "s.mp4", 50, audio=True)
    import av

    video = encode.encode_clip(Clip("s", str(path), start=0.25, end=0.75))
    (tmp_path / "cut.mp4").write_bytes(video)
    with av.open(tmp_path / "cut.mp4") as file:
        samples = sum(f.samples for f in file.decode(audio=0))
        rate = file.streams.audio[0].rate
    assert 0.4 < samples / rate < 0.7


def test_folders_of_frames_are_encoded(tmp_path, folder):
    from PIL import Image

    (tmp_path / "f").mkdir()
    for i in range(20):
        Image.fromarray(clips.picture(i)).save(tmp_path / "f" / f"{i:05}.png")
    packed.build([Clip("f", str(tmp_path / "f"), frames=18)], folder)
    assert _numbers(sources.open_source(folder), 0) == list(range(18))


# -- failures -------------------------------------------------------------------------------------


def _nothing_left(folder):
    return [name for name in os.listdir(folder.parent) if "packed" in name] == []


def test_bad_clips_are_left_out_up_to_a_share(records, folder):
    (folder.parent / "a.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 3 clips do not decode.*a\.mp4: is empty"):
        packed.build(records, folder)
    assert _nothing_left(folder)
    report = packed.build(records, folder, packed.PackOptions(max_bad_share=0.5))
    assert report.clips == 2
    assert report.left_out == [(records[0].path, "is empty (zero bytes)")]
    assert [c.id for c in sources.open_source(folder).clips] == ["b", "c"]


def test_nothing_decodes(folder):
    options = packed.PackOptions(max_bad_share=1.0)
    with pytest.raises(DataError, match="none of the 1 clips decodes"):
        packed.build([Clip("x", "/nowhere/x.mp4")], folder, options)
    assert _nothing_left(folder)


def test_full_disk(records, folder):
    disk = folder.parent / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        with pytest.raises(DataError, match="the disk is full"):
            packed.build(records * 4, disk / "packed")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_said_by_the_system(records, folder, monkeypatch):
    def full(self, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packed.Shards, "write", full)
    with pytest.raises(DataError, match="the disk is full"):
        packed.build(records, folder)
    assert _nothing_left(folder)


def test_full_disk_said_by_the_record_writer(records, folder, monkeypatch):
    def full(self):
        raise RuntimeError("write() failed: No space left on device; writing x")

    monkeypatch.setattr(packed.Shards, "close", full)
    with pytest.raises(DataError, match="the disk is full"):
        packed.build(records, folder)
    assert _nothing_left(folder)


def test_unwritable_folder(records, folder):
    folder.parent.joinpath("file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        packed.build(records, folder.parent / "file" / "packed")


def test_existing_folder(records, folder):
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(DataError, match="already exists"):
        packed.build(records, folder)
    assert (folder / "precious").exists()
    packed.build(records, folder, packed.PackOptions(overwrite=True))
    assert len(sources.open_source(folder)) == 3


def test_interrupted_build_leaves_nothing(records, folder):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed.build(records, folder, progress=stop)
    assert _nothing_left(folder)


def test_damaged_sets_are_refused(records, folder):
    packed.build(records, folder, packed.PackOptions(shard_bytes=1))
    with pytest.raises(DataError, match="no split 'val'; known: test, train"):
        sources.open_source(folder, split="val")
    index = folder / sources.PACKED_INDEX
    whole = index.read_text()
    index.write_text(whole.splitlines()[0] + "\n")
    with pytest.raises(DataError, match="lists 1 clips, the shards hold 3"):
        sources.open_source(folder)
    index.write_text("{\n")
    with pytest.raises(DataError, match=r"iv2_clips\.jsonl:1: is damaged"):
        sources.open_source(folder)
    index.write_text(whole)
    shard = next(folder.glob("*train*-00001-of-00002"))
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(DataError, match="split 'train' lacks shard 1"):
        sources.open_source(folder)
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="a shard is damaged"):
        sources.open_source(folder)
    damaged = bytearray(content)
    damaged[1000:1400] = bytes(400)
    shard.write_bytes(bytes(damaged))
    source = sources.open_source(folder)
    with pytest.raises(DecodeError, match="cannot be read from its shard"):
        source.open(2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "My Set"}, "lower-case letters"),
        ({"gop": 0}, "gop must be at least 1"),
        ({"short_side": 2}, "short_side must be at least 16"),
    ],
)
def test_bad_options(changes, words):
    with pytest.raises(DataError, match=words):
        packed.PackOptions(**changes)


def test_split_names_that_cannot_name_files(records, folder):
    strange = [dataclasses.replace(records[0], split="a/b")]
    with pytest.raises(DataError, match="split 'a/b' cannot name files"):
        packed.build(strange, folder)


def test_index_is_a_manifest(records, folder):
    packed.build(records, folder)
    lines = (folder / sources.PACKED_INDEX).read_text().splitlines()
    assert [json.loads(line)["shard_split"] for line in lines] == ["test", "train", "train"]


def test_every_media_type_comes_back(tmp_path, folder):
    lists = multimodal.write_lists(tmp_path)
    clips.write_clip(tmp_path / "long.mp4", 20)
    more = [
        {"path": "long.mp4", "sound": "s2.wav", "captions": {"video": "a dog", "avs": ["b", "c"]}},
        {"path": "p1.png", "crop": [0, 0, 8, 48], "options": ["x", "y"], "answers": [1]},
        {"path": "s4.wav", "start": 0.1, "end": 0.3, "captions": {"audio": "rain"}},
        {"captions": "text alone"},
        {"path": "long.mp4", "id": "bad", "sound": "p1.png", "captions": "x"},
    ]
    path = clips.write_manifest(tmp_path / "more.jsonl", more)
    records = manifest.read_clips(path)
    report = packed.build(records, folder)
    assert (report.clips, [p[-6:] for p, _ in report.sounds_left_out]) == (5, ["p1.png"])
    for index_file in (True, False):
        if not index_file:
            (folder / sources.PACKED_INDEX).unlink()
        source = sources.open_source(folder)
        assert [c.captions for c in source.clips] == [c.captions for c in records]
        assert [c.sound for c in source.clips] == [c.sound for c in records]
        assert (source.clips[1].crop, source.clips[1].options) == (
            (0.0, 0.0, 8.0, 48.0),
            ("x", "y"),
        )
        assert source.clips[1].answers == (1,)
        assert source.open(1).read([0]).shape == (1, 48, 8, 3)
        assert len(audio.load_waveform(source.sound(0).source)) == 8000
        assert not source.sound(0).from_video
        assert len(audio.load_waveform(source.sound(2).source)) == 3200
        with pytest.raises(DecodeError, match="text alone"):
            source.open(3)
    for media in ("audio_video", "image", "audio", "text"):
        built = tmp_path / f"packed_{media}"
        packed.build(manifest.read_clips(lists[media].source), built)
        for workers in (0, 1) if media == "audio_video" else (0,):
            config = dataclasses.replace(lists[media], num_workers=workers)
            ours = dataclasses.replace(config, source=str(built))
            for a, b in zip(_first_batches(ours), _first_batches(config), strict=True):
                assert set(a) == set(b)
                for name in a:
                    np.testing.assert_array_equal(a[name], b[name], err_msg=f"{media} {name}")


def _first_batches(config):
    with make_loader(config, seed=1, global_batch=4, num_steps=3) as loader:
        return list(loader)
