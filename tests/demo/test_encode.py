"""Clips that the demo writes."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from iv2_jax.demo.encode import KEYFRAME_EVERY, Sound, write_clip


def moving_square(count=40, height=48, width=64):
    frames = np.full((count, height, width, 3), 40, np.uint8)
    for t, frame in enumerate(frames):
        frame[16:32, t : t + 16] = (200, 60, 90)
    return frames


@pytest.fixture
def clip(tmp_path):
    """40 frames of 30 a second; silence, then a tone from second 0.8 on."""
    rate = 30720
    seconds = np.arange(rate * 40 // 30) / rate
    tone = np.where(seconds >= 0.8, np.sin(2 * np.pi * 440 * seconds) * 12000, 0)
    path = tmp_path / "clip.mp4"
    sound = Sound(tone.astype(np.int16), rate)
    write_clip(path, moving_square(), fps=Fraction(30), sound=sound)
    return path


def test_pictures_come_back(clip):
    with av.open(str(clip)) as container:
        assert container.streams.video[0].average_rate == 30
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert frames.shape == (40, 48, 64, 3)
    assert np.abs(frames.astype(int) - moving_square()).mean() < 4


def test_a_keyframe_every_so_often(clip):
    with av.open(str(clip)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    assert [p.is_keyframe for p in packets] == [i % KEYFRAME_EVERY == 0 for i in range(40)]
    assert all(p.pts == p.dts for p in packets)  # no B-frames: stored in the order shown


def test_sound_is_in_step(clip):
    with av.open(str(clip)) as container:
        stream = container.streams.audio[0]
        sound = list(container.decode(stream))
        start = float(sound[0].pts * sound[0].time_base)
        samples = np.concatenate([f.to_ndarray()[0] for f in sound])
        rate = stream.rate
    loud = np.abs(samples).reshape(-1, 32).max(1) > 0.1
    assert start + np.argmax(loud) * 32 / rate == pytest.approx(0.8, abs=0.05)
    assert len(samples) / rate == pytest.approx(40 / 30, abs=0.1)


def test_the_same_frames_give_the_same_file(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, moving_square(), fps=Fraction(25))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_stored_size(tmp_path):
    write_clip(tmp_path / "s.mp4", moving_square(4), fps=Fraction(25), size=(32, 32))
    with av.open(str(tmp_path / "s.mp4")) as container:
        assert not container.streams.audio
        frame = next(container.decode(video=0))
    assert (frame.height, frame.width) == (32, 32)
