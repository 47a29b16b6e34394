"""Cutting natural footage out of installed packages."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest

from iv2_jax.data.decode import VideoReader
from iv2_jax.demo import footage, natural_clips
from iv2_jax.demo.encode import Sound, write_clip
from iv2_jax.demo.footage import SEGMENTS, Segment, Source
from iv2_jax.demo.natural_clips import cut_clips


def test_no_shot_is_in_two_splits():
    splits = collections.defaultdict(set)
    for segment in SEGMENTS:
        splits[segment.group].add(segment.split)
    assert all(len(s) == 1 for s in splits.values())
    assert set.union(*splits.values()) == {"train", "test"}


def test_segments_do_not_overlap_and_have_unique_names():
    assert len({s.id for s in SEGMENTS}) == len(SEGMENTS)
    for a, b in itertools.pairwise(SEGMENTS):
        assert a.end > a.start
        assert a.source != b.source or a.end <= b.start


def test_annotations_are_complete():
    for segment in SEGMENTS:
        assert len(segment.captions) >= 2, segment.id
        assert all(c[0].isupper() and c.endswith(".") for c in segment.captions), segment.id
        assert segment.qa, segment.id
        assert all(q.endswith("?") and a for q, a in segment.qa), segment.id


def test_held_out_topics_are_seen_in_training():
    topics = {
        split: {s.source.topic for s in SEGMENTS if s.split == split} for split in ("train", "test")
    }
    assert topics["test"] <= topics["train"]


@pytest.mark.parametrize("source", sorted({s.source for s in SEGMENTS}, key=lambda s: s.file))
def test_segments_lie_within_their_video(source):
    path = source.find()
    if path is None:
        pytest.skip(f"{source.package} is not installed")
    with VideoReader(path) as reader:
        last = reader.timestamps[-1]
    assert max(s.end for s in SEGMENTS if s.source == source) <= last + 0.05


@pytest.fixture
def own_video(tmp_path, monkeypatch):
    """A module on the import path that carries a video of 50 frames with sound."""
    package = tmp_path / "path" / "carries_a_video"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    frames = np.zeros((50, 240, 320, 3), np.uint8)
    frames[:25] = 200  # the second second is dark
    sound = np.zeros(64000, np.int16)
    sound[32000:] = np.sin(np.arange(32000) / 5) * 9000
    write_clip(package / "v.mp4", frames, fps=Fraction(25), sound=Sound(sound, 32000))
    monkeypatch.syspath_prepend(tmp_path / "path")
    return Source("carries-a-video", "v.mp4", "carries_a_video", "test pictures")


def segment(source, start, end, split="train"):
    return Segment(source, start, end, 0, split, ("One.", "Two."), (("Why?", "because"),))


def test_cuts_the_right_second(own_video, tmp_path):
    found = cut_clips(tmp_path / "out", [segment(own_video, 1.0, 1.8, "test")])
    (clip,) = found.clips
    assert found.missing == ()
    assert clip.path == "out/v_shot0_01000.mp4"
    assert clip.labels == {"topic": "test pictures"}
    assert clip.split == "test"
    assert clip.audio is True
    with VideoReader(tmp_path / clip.path) as reader:
        assert len(reader) == 20
        assert reader.fps == pytest.approx(25)
        frames = reader.read([0, 19])
    assert frames.shape == (2, 160, 214, 3)  # the short side is made 160, the long one even
    assert frames.max() < 40
    sound = natural_clips._read_sound(tmp_path / clip.path, 0.0, 0.8)
    assert len(sound.samples) == pytest.approx(0.8 * sound.rate, rel=0.01)
    assert np.abs(sound.samples[2000:]).max() > 5000


def test_small_pictures_keep_their_size():
    assert natural_clips._stored(144, 176) == (144, 176)
    assert natural_clips._stored(272, 640) == (160, 376)


def test_missing_packages_are_counted(own_video, tmp_path):
    nowhere = Source("not-installed", "a.mp4", "no_such_module_anywhere", "none")
    nofile = dataclasses.replace(own_video, file="b.mp4")
    loose = Source("no-such-distribution", "c.mpg", None, "none")
    segments = [segment(s, 0.0, 0.4) for s in (nowhere, own_video, nofile, loose)]
    found = cut_clips(tmp_path / "out", segments)
    assert [clip.id for clip in found.clips] == ["v_shot0_00000"]
    assert found.missing == (
        "not-installed: a.mp4",
        "carries-a-video: b.mp4",
        "no-such-distribution: c.mpg",
    )


def test_finds_files_outside_of_modules():
    """pip itself brings a file that no module holds: its licence."""
    path = footage._distribution_file("pip", "METADATA")
    assert path is not None
    assert path.is_file()
