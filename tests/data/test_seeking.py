"""Jumping to keyframes: few packets are decoded, frames are the ones asked for, else in order."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import av
import numpy as np
import pytest

from iv2_jax.data import packets
from iv2_jax.data.decode import VideoReader
from tests.data import clips

_GROUPS = {
    "every frame": {"g": "1"},
    "4": {"g": "4", "bf": "0"},
    "4, B-frames": {"g": "4", "bf": "2"},
    "12, B-frames": {"g": "12", "bf": "3"},
    "16": {"g": "16", "bf": "0"},
    "16, open": {"g": "16", "bf": "3", "x264-params": "open-gop=1"},
    "48, pyramid": {"g": "48", "x264-params": "b-pyramid=normal:bframes=5"},
    "250": {"g": "250"},
}
_FRAMES = 120
_EVEN = {"sc_threshold": "0"}  # no keyframes of the encoder's own choice


@pytest.fixture(scope="module", params=_GROUPS)
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    return clips.write_clip(folder / "a.mp4", _FRAMES, options=_GROUPS[request.param])


@pytest.mark.parametrize("held", [True, False], ids=["held", "read again"])
def test_every_choice_of_frames_is_found_by_seeking(path, held, monkeypatch):
    if not held:
        monkeypatch.setattr(packets, "HELD_BYTES", 0)
    rng = np.random.default_rng(0)
    with VideoReader(path) as reader:
        for count in (1, 2, 8, 30):
            wanted = np.sort(rng.choice(_FRAMES, count, replace=False))
            assert clips.numbers(reader.read(wanted)) == wanted.tolist()
        assert (reader.counts.sought, reader.counts.fallbacks) == (4, 0)


def test_packets_decoded_are_those_between_keyframe_and_frame(tmp_path):
    path = clips.write_clip(tmp_path / "a.mp4", _FRAMES, options={"g": "12", "bf": "0", **_EVEN})
    with VideoReader(path) as reader:
        reader.read([5, 7, 30, 100])
        # 0..7, 24..30, 96..100: nothing is decoded to push a frame out, nothing twice.
        assert (reader.counts.packets, reader.counts.jumps) == (8 + 7 + 5, 3)
        reader.read(range(40, 60))  # close together: in one go from keyframe 36 on
        assert (reader.counts.packets, reader.counts.jumps) == (20 + 24, 3 + 1 + 1)


def test_close_frames_are_read_on_and_not_jumped_to(tmp_path):
    path = clips.write_clip(tmp_path / "a.mp4", _FRAMES, options={"g": "250", "bf": "3", **_EVEN})
    with VideoReader(path) as reader:
        reader.read([3, 50, 119])
        assert reader.counts.jumps == 1
        assert _FRAMES - 4 <= reader.counts.packets <= _FRAMES


def _packets(path):
    with av.open(path) as file:
        stream = file.streams.video[0]
        found = [p for p in file.demux(stream) if p.size]
        return stream.codec_context.extradata, stream.time_base, found


def _remux(source, target, change):
    """Copies the packets of a file; `change` may alter each (index, packet)."""
    with av.open(source) as given, av.open(target, "w") as output:
        stream = given.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for i, packet in enumerate(p for p in given.demux(stream) if p.size):
            change(i, packet)
            packet.stream = copy
            output.mux(packet)
    return target


@pytest.mark.parametrize("pair", [(20, 21), (1, 2)])
def test_two_frames_of_one_time_are_counted_in_order(tmp_path, pair):
    source = clips.write_clip(tmp_path / "a.mp4", 40, options={"g": "8", "bf": "0"})
    first, second = pair

    def double(i, packet):
        if i == second:
            packet.pts = packet.dts = packet.pts - packet.duration

    path = _remux(source, tmp_path / "b.mkv", double)
    with VideoReader(path) as reader:
        times = reader.timestamps
        assert len(times) == 40
        assert clips.numbers(reader.read([first, second, 33])) == [first, second, 33]
        assert (reader.counts.sought, reader.counts.in_order, reader.counts.fallbacks) == (0, 1, 0)


def test_frames_without_times_are_counted_in_order(tmp_path):
    path = clips.write_clip(tmp_path / "a.h264", 30, options={"g": "8"}, file_format="h264")
    with VideoReader(path) as reader:
        assert clips.numbers(reader.read([2, 17, 29])) == [2, 17, 29]
        assert (reader.counts.sought, reader.counts.in_order) == (0, 1)


@pytest.mark.parametrize("b_frames", ["0", "3"])
def test_variable_rate_is_sought_by_time(tmp_path, b_frames):
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.integers(10, 400, 60)) / 1000
    path = clips.write_clip(
        tmp_path / "a.mp4", 60, times=times.tolist(), options={"g": "10", "bf": b_frames}
    )
    with VideoReader(path) as reader:
        np.testing.assert_allclose(np.diff(reader.timestamps), np.diff(times), atol=2e-3)
        wanted = [0, 9, 10, 11, 37, 59]
        assert clips.numbers(reader.read(wanted)) == wanted
        assert reader.counts.fallbacks == 0


def test_a_keyframe_that_is_none_is_noticed_and_counted(tmp_path, monkeypatch):
    path = clips.write_clip(tmp_path / "a.mp4", 60, options={"g": "250", "bf": "0", **_EVEN})
    honest = packets.scan

    def lie(*args, **kwargs):
        table, problem = honest(*args, **kwargs)
        return dataclasses.replace(table, keys=np.arange(0, 60, 10)), problem

    monkeypatch.setattr(packets, "scan", lie)
    with VideoReader(path) as reader:
        assert clips.numbers(reader.read([5, 34, 57])) == [5, 34, 57]
        assert (reader.counts.sought, reader.counts.fallbacks, reader.counts.in_order) == (0, 1, 1)


def test_a_stretch_in_the_middle_of_a_long_file(tmp_path):
    path = clips.write_clip(tmp_path / "a.mp4", 250, options={"g": "12", "bf": "3"}, rate=25)
    with VideoReader(path, start=6.0, end=9.0) as reader:
        assert clips.numbers(reader.read([0, 40, 74])) == [150, 190, 224]
        assert reader.counts.sought == 1
        assert reader.counts.packets < 40


def test_frames_shown_at_a_time_are_where_the_container_says(tmp_path):
    base = Fraction(1, 12800)
    path = clips.write_clip(tmp_path / "a.mp4", 50, options={"g": "10", "bf": "2"})
    _, unit, found = _packets(path)
    assert unit == base
    shown = sorted(p.pts for p in found)
    with VideoReader(path) as reader:
        np.testing.assert_allclose(reader.timestamps, [p * float(base) for p in shown], atol=1e-6)
