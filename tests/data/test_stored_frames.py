"""Clips packed as sampled frames: the same pictures, words and sound, without the video."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from iv2_jax.data import audio, manifest, rows, sampling_stage2, sources
from iv2_jax.data.builders import packed
from iv2_jax.data.builders.frames import FrameOptions
from iv2_jax.data.decode import DecodeError
from iv2_jax.data.modalities import AudioConfig
from iv2_jax.data.pipeline import DataConfig, make_loader
from iv2_jax.data.records import Clip
from iv2_jax.data.stored_frames import StoredFrames
from iv2_jax.errors import DataError
from tests.data import clips

_WHOLE = FrameOptions(8)


def _build(records, folder, options=_WHOLE):
    return packed.build(records, folder, packed.PackOptions(frames=options))


@pytest.fixture
def records(tmp_path):
    clips.write_clip(tmp_path / "a.mp4", 40, audio=True)
    clips.write_clip(tmp_path / "b.mp4", range(50, 100))
    return [
        Clip("a", str(tmp_path / "a.mp4"), captions={"video": ("one",)}, labels={"label": 3}),
        Clip("b", str(tmp_path / "b.mp4"), start=0.4, end=1.2, qa=(("q", "a"),), audio=False),
    ]


def _numbers(source, index):
    clip = source.open(index)
    return clips.numbers(clip.read(range(len(clip))))


def test_the_rule_picks_the_frames_and_the_record_stays(records, tmp_path):
    report = _build(records, tmp_path / "packed")
    assert (report.clips, report.left_out, report.sounds_left_out) == (2, [], [])
    source = sources.open_source(tmp_path / "packed")
    assert list(source.clips) == records
    assert _numbers(source, 0) == sampling_stage2.middle(40, 8).tolist()
    assert _numbers(source, 1) == (60 + sampling_stage2.middle(20, 8)).tolist()
    worker = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(worker.open(0).read([3, 1]), source.open(0).read([3, 1]))
    clip = source.open(1)
    assert clip.fps == pytest.approx(7 / (18 / 25), rel=1e-4)  # frames 0, 3, ... 18
    with pytest.raises(IndexError, match="stores 8"):
        clip.read([8])


def test_a_stored_crop_is_the_view_that_center_shows(tmp_path):
    path = clips.write_clip(tmp_path / "a.mp4", 40, size=(96, 64))
    records = [Clip("a", str(path))]
    _build(records, tmp_path / "packed", FrameOptions(8, crop=32, sampling="segments", quality=95))
    view = {"num_frames": 8, "size": 32, "augment": "center", "eval": True, "sampling": "segments"}
    shown = []
    for source in (tmp_path / "packed", None):
        config = DataConfig(source=str(source or ""), threads=0, **view)
        given = None if source else sources.FileSource(records)
        with make_loader(config, seed=0, global_batch=1, source=given) as loader:
            shown.append(next(loader)["video"].astype(int))
    assert shown[0].shape == (1, 8, 32, 32, 3)
    assert clips.numbers(shown[0][0]) == clips.numbers(shown[1][0])
    assert np.abs(shown[0] - shown[1]).mean() < 6  # sharp edges under JPEG


def test_as_many_frames_as_are_wanted_are_all_given(records, tmp_path):
    _build(records, tmp_path / "packed")
    source = sources.open_source(tmp_path / "packed")
    rng = np.random.default_rng(0)
    for settings in ({}, {"eval": True, "augment": "center"}, {"sampling": "dense"}):
        config = DataConfig(num_frames=8, size=32, **settings)
        train, evaluate = rows.sampling_rule(source.open(0), config)
        assert train(8, 8, rng).tolist() == evaluate(8, 8, 0, 1).tolist() == list(range(8))
    train, _ = rows.sampling_rule(source.open(0), DataConfig(num_frames=4, size=32))
    chosen = [train(8, 4, rng).tolist() for _ in range(20)]
    assert all(0 <= i - 2 * k < 2 for row in chosen for k, i in enumerate(row))
    assert len({tuple(row) for row in chosen}) > 1


def test_sound_comes_along_and_counts_as_a_videos(records, tmp_path):
    _build(records, tmp_path / "packed")
    source = sources.open_source(tmp_path / "packed")
    stored, original = source.sound(0), sources.FileSource(records).sound(0)
    assert stored.from_video
    ours = audio.load_waveform(stored.source)
    theirs = audio.load_waveform(original.source)
    assert len(ours) == len(theirs) > 15000
    np.testing.assert_allclose(ours, theirs, atol=2**-15)
    config = DataConfig(
        source=str(tmp_path / "packed"),
        media="audio_video",
        audio=AudioConfig(seconds=1.0, crop="first"),
        num_frames=8,
        size=32,
        augment="center",
        eval=True,
        threads=0,
    )
    with make_loader(config, seed=0, global_batch=2) as loader:
        batch = next(loader)
        assert batch["has_audio"].tolist() == [True, False]  # b's video had none
        assert loader.bad_sounds == 0
    silent = packed.PackOptions(frames=_WHOLE, keep_audio=False)
    packed.build(records, tmp_path / "silent", silent)
    assert audio.load_waveform(sources.open_source(tmp_path / "silent").sound(0).source) is None


def test_short_side_and_what_does_not_go_together(tmp_path):
    path = clips.write_clip(tmp_path / "a.mp4", 20, size=(96, 64))
    _build([Clip("a", str(path))], tmp_path / "packed", FrameOptions(4, short_side=32))
    assert sources.open_source(tmp_path / "packed").open(0).read([0]).shape == (1, 32, 48, 3)
    with pytest.raises(DataError, match="exclude"):
        FrameOptions(4, crop=32, short_side=32)
    with pytest.raises(DataError, match=r"frames\.quality"):
        FrameOptions(4, quality=0)
    with pytest.raises(DataError, match="gop"):
        packed.PackOptions(frames=_WHOLE, gop=16)


def test_tfds_gives_the_pictures(records, tmp_path):
    import tensorflow_datasets as tfds

    _build(records, tmp_path / "packed")
    data = tfds.builder_from_directory(tmp_path / "packed").as_data_source(split="train")
    pictures = list(data[0]["frames"])
    assert len(pictures) == len(data[0]["seconds"]) == 8
    assert all(picture[:2] == b"\xff\xd8" for picture in pictures)


def test_damaged_pictures_are_named(records, tmp_path):
    _build(records, tmp_path / "packed")
    good = sources.open_source(tmp_path / "packed").open(0)._pictures
    for broken in (b"not a picture", good[0][: len(good[0]) // 3], b""):
        clip = StoredFrames([good[0], broken], [0.0, 1.0], name="x")
        with pytest.raises(DecodeError, match=r"x: its picture 1"):
            clip.read([1])
        assert clip.read([0]).shape == (1, clips.HEIGHT, clips.WIDTH, 3)  # decodes on after it
    with pytest.raises(DecodeError, match="2 pictures and 1 times"):
        StoredFrames(good[:2], [0.0], name="x")
    assert len(StoredFrames(good[:3], [0.0, 1.0, 2.0], name="x", end=1.5)) == 2


def test_keyframes_close_together_and_frames_by_the_command(tmp_path):
    from iv2_jax.cli import main

    listed = clips.write_list(tmp_path / "list", count=2, frames=40)
    assert (
        main(["data", "build", str(listed), str(tmp_path / "k"), "--keyframe-interval", "4"]) == 0
    )
    with sources.open_source(tmp_path / "k").open(0) as reader:
        reader.read([0, 21])
        assert reader.counts.packets <= 5
    command = ["data", "build", str(listed), str(tmp_path / "f"), "--frames", "4", "--crop", "32"]
    assert main(command) == 0
    source = sources.open_source(tmp_path / "f")
    assert source.open(1).read(range(4)).shape == (4, 32, 32, 3)
    assert list(source.clips) == list(manifest.read_clips(listed))
