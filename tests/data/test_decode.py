"""Decoding: exact frames from every kind of file, and a clear error from every broken one."""

from __future__ import annotations

import os
import pickle

import av
import numpy as np
import pytest

from iv2_jax.data import packets
from iv2_jax.data.decode import DecodeError, VideoReader
from tests.data import clips

_ENCODERS = {
    "h264 with B-frames": ("a.mp4", {"options": {"bf": "3", "g": "250"}}),
    "h264 short groups": ("a.mp4", {"options": {"g": "5", "bf": "0"}}),
    "h264 open groups": ("a.mkv", {"options": {"x264-params": "open-gop=1:keyint=6:bframes=2"}}),
    "h264 intra refresh": ("a.mkv", {"options": {"x264-params": "intra-refresh=1:keyint=8"}}),
    "h264 b-pyramid": ("a.mov", {"options": {"x264-params": "b-pyramid=normal:bframes=4"}}),
    "10 bit": ("a.mp4", {"pix_fmt": "yuv420p10le"}),
    "4:4:4": ("a.mp4", {"pix_fmt": "yuv444p"}),
    "hevc": ("a.mp4", {"codec": "libx265", "options": {"x265-params": "log-level=none"}}),
    "hevc open groups": (
        "a.mp4",
        {
            "codec": "libx265",
            "options": {"x265-params": "log-level=none:open-gop=1:keyint=8:bframes=3"},
        },
    ),
    "av1": ("a.mp4", {"codec": "libsvtav1", "options": {"preset": "12", "svtav1-params": "lp=1"}}),
    "vp9": ("a.webm", {"codec": "libvpx-vp9", "options": {"deadline": "realtime"}}),
    "mpeg4 in avi": ("a.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
    "mpeg1 program stream": ("a.mpg", {"codec": "mpeg1video", "options": {"g": "6"}}),
    "transport stream": ("a.ts", {}),
    "gif": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8", "rate": 10}),
    "odd size": ("a.mp4", {"pix_fmt": "yuv444p", "size": (65, 47)}),
    "with sound": ("a.mp4", {"audio": True}),
}


def _write(folder, name, **options):
    try:
        return clips.write_clip(folder / name, **options)
    except av.codec.codec.UnknownCodecError as e:
        pytest.skip(f"this build of FFmpeg cannot write it: {e}")


@pytest.mark.parametrize("held", [True, False], ids=["packets held", "packets read again"])
@pytest.mark.parametrize("kind", _ENCODERS)
def test_frames_are_exact(tmp_path, kind, held, monkeypatch):
    name, options = _ENCODERS[kind]
    path = _write(tmp_path, name, frames=40, **options)
    if not held:
        monkeypatch.setattr(packets, "HELD_BYTES", 0)
    with VideoReader(path) as reader:
        assert len(reader) == 40
        assert clips.numbers(reader.read([3, 38, 17, 3])) == [3, 38, 17, 3]
        assert clips.numbers(reader.read([0])) == [0]  # backwards, after a jump
        assert clips.numbers(reader.read(range(40))) == list(range(40))
        assert reader.warnings == []


def test_jumps_give_the_pixels_of_decoding_in_order(tmp_path, monkeypatch):
    path = _write(tmp_path, "a.mp4", frames=60, options={"bf": "3", "g": "12"})
    wanted = [1, 14, 15, 33, 58]
    with VideoReader(path) as reader:
        jumped = reader.read(wanted)
    monkeypatch.setattr(packets, "trusted", lambda *_: False)
    with VideoReader(path) as reader:
        np.testing.assert_array_equal(reader.read(wanted), jumped)


def test_a_frame_that_does_not_turn_up_is_decoded_in_order(tmp_path, monkeypatch):
    path = _write(tmp_path, "a.mp4", frames=30, options={"g": "10", "bf": "0"})
    honest = packets.PacketTable.keyframe_before
    # A wrong keyframe: what follows refers to frames the decoder never saw.
    monkeypatch.setattr(
        packets.PacketTable, "keyframe_before", lambda table, place: honest(table, place) + 3
    )
    with VideoReader(path) as reader:
        assert clips.numbers(reader.read([5, 26])) == [5, 26]


def test_only_the_needed_frames_are_fed_to_the_decoder(tmp_path, monkeypatch):
    path = _write(tmp_path, "a.mp4", frames=120, options={"g": "8", "bf": "0"})
    fed = []
    original = VideoReader._feed
    monkeypatch.setattr(VideoReader, "_feed", lambda self, *a: fed.append(1) or original(self, *a))
    with VideoReader(path) as reader:
        reader.read([4, 116])
    assert len(fed) < 30


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_display_matrix_is_applied(tmp_path, rotation):
    path = _write(tmp_path, "a.mp4", frames=5, rotation=rotation)
    with VideoReader(path) as reader:
        frames = reader.read(range(5))
    assert frames.shape == (5, clips.HEIGHT, clips.WIDTH, 3)
    assert clips.numbers(frames) == list(range(5))


def test_variable_rate_is_cut_by_time(tmp_path):
    times = [0.0, 0.1, 0.2, 1.0, 1.1, 4.0, 4.5]
    path = _write(tmp_path, "a.mp4", frames=7, times=times)
    with VideoReader(path) as reader:
        np.testing.assert_allclose(reader.timestamps, times, atol=2e-3)
    with VideoReader(path, start=1.0, end=4.2) as reader:
        assert clips.numbers(reader.read(range(len(reader)))) == [3, 4, 5]
    with VideoReader(path, start=2.0, end=3.0) as reader:  # frame 4 stays on screen
        assert clips.numbers(reader.read(range(len(reader)))) == [4]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, 1.0, (0, 25)),
        (1.0, None, (25, 200)),
        (6.4, 7.2, (160, 180)),
        (6.41, 6.42, (160, 161)),
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_stretches(tmp_path, name, start, end, expected):
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = _write(tmp_path, name, frames=200, codec=codec, options={"g": "20"})
    with VideoReader(path, start=start, end=end) as reader:
        shown = clips.numbers(reader.read(range(len(reader))))
        walked = clips.numbers(np.stack([pixels for _, pixels in reader.walk()]))
    assert shown == list(range(*expected))
    assert walked == shown


def test_one_frame_and_pictures(tmp_path):
    path = _write(tmp_path, "a.mp4", frames=[77])
    with VideoReader(path) as reader:
        assert clips.numbers(reader.read([0, 0, 0])) == [77] * 3
    from PIL import Image

    Image.fromarray(clips.picture(9)).save(tmp_path / "a.png")
    with VideoReader(tmp_path / "a.png") as reader:
        assert clips.numbers(reader.read([0])) == [9]


def test_bytes_are_read_like_files(tmp_path):
    path = _write(tmp_path, "a.mp4", frames=12)
    with VideoReader(path.read_bytes(), name="x") as reader:
        assert clips.numbers(reader.read([7, 2])) == [7, 2]
        assert reader.name == "x"


def test_largest_stream_is_taken(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(path, "w") as output:
        streams = [output.add_stream("libx264", rate=25) for _ in range(2)]
        for stream, width in zip(streams, (32, 64), strict=True):
            stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
        for i in range(4):
            for stream in streams:
                picture = clips.picture(i + (100 if stream.width == 64 else 0), stream.width)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            output.mux(stream.encode(None))
    with VideoReader(path) as reader:
        assert clips.numbers(reader.read([0, 3])) == [100, 103]


def test_size_that_changes_within_a_file(tmp_path):
    parts = []
    for i, size in enumerate([(64, 48), (96, 72)]):
        path = tmp_path / f"{i}.ts"
        parts.append(_write(tmp_path, path.name, frames=range(i * 8, i * 8 + 8), size=size))
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(p.read_bytes() for p in parts))
    with VideoReader(both) as reader:
        frames = reader.read([1, len(reader) - 2])
    assert frames.shape == (2, 48, 64, 3)


# -- broken files ---------------------------------------------------------------------------------


def _broken(tmp_path, kind):
    path = tmp_path / f"{kind}.mp4"
    whole = _write(tmp_path, "whole.mp4", frames=60, options={"bf": "0"}).read_bytes()
    if kind == "missing":
        return path
    if kind == "audio only":
        return clips.write_sound(tmp_path / "a.m4a")
    if kind == "folder":
        path.mkdir()
        return path
    damaged = bytearray(whole)
    middle = len(whole) // 3
    damaged[middle : middle + 400] = bytes([255]) * 400
    content = {
        "empty": b"",
        "cut before its index": whole[: len(whole) // 2],
        "corrupt": bytes(damaged),
        "text": b"this is not a video\n" * 50,
    }[kind]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "does not exist"),
        ("empty", "zero bytes"),
        ("cut before its index", "cannot be opened"),
        ("corrupt", "corrupt at packet"),
        ("text", "cannot be opened"),
        ("audio only", "no video stream (it has: audio)"),
        ("folder", "is a folder"),
    ],
)
def test_broken_files_are_named(tmp_path, kind, words):
    path = _broken(tmp_path, kind)
    with pytest.raises(DecodeError) as caught, VideoReader(path) as reader:
        reader.read([len(reader) - 1, 30])
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))  # comes out of worker processes like this
    assert (copy.path, copy.reason) == (str(path), caught.value.reason)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx265"), ("a.avi", "mpeg4")]
)
def test_any_damage_gives_frames_or_a_decode_error(tmp_path, name, codec):
    whole = _write(tmp_path, name, frames=20, codec=codec).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 12)):
            damaged[at : at + rng.integers(1, 20)] = rng.bytes(int(rng.integers(1, 20)))
        content = bytes(damaged[: len(damaged) if rng.random() < 0.7 else rng.integers(1, 9999)])
        try:
            with VideoReader(content) as reader:
                frames = reader.read([0, len(reader) // 2, len(reader) - 1])
            assert frames.dtype == np.uint8
        except DecodeError:
            refused += 1
    assert refused > 0


def test_cut_file_is_used_as_far_as_it_goes(tmp_path):
    whole = _write(
        tmp_path, "w.mp4", frames=60, options={"bf": "0"}, file_options={"movflags": "faststart"}
    ).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: len(whole) * 7 // 10])
    with VideoReader(path) as reader:
        left = len(reader)
        assert 20 < left < 60
        shown = clips.numbers(reader.read(range(left)))
        assert shown[: left - 3] == list(range(left - 3))
        assert any("cut off" in warning for warning in reader.warnings)


def test_start_beyond_the_end(tmp_path):
    path = _write(tmp_path, "a.mp4", frames=25)
    for start in (3.0, 30.0):
        with pytest.raises(DecodeError, match="ends before"), VideoReader(path, start=start) as r:
            len(r)


def test_indices_out_of_range(tmp_path):
    path = _write(tmp_path, "a.mp4", frames=5)
    with VideoReader(path) as reader:
        for wanted in ([5], [-1]):
            with pytest.raises(IndexError, match=r"a\.mp4"):
                reader.read(wanted)
        with pytest.raises(ValueError, match="no frame"):
            reader.read([])


def test_nothing_leaks(tmp_path):
    good = _write(tmp_path, "a.mp4", frames=8)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"x" * 100)

    def rounds(count):
        for _ in range(count):
            with VideoReader(good) as reader:
                reader.read([0, 7])
            with pytest.raises(DecodeError):
                VideoReader(bad)
        with open("/proc/self/statm") as statm:
            return len(os.listdir("/proc/self/fd")), int(statm.read().split()[1]) * 4096

    if not os.path.exists("/proc/self/statm"):
        pytest.skip("counts open files and memory through /proc")
    files, memory = rounds(30)
    files_after, memory_after = rounds(150)
    assert files_after <= files
    assert memory_after - memory < 8 << 20


# -- the originals --------------------------------------------------------------------------------


def test_originals_match_decoding_in_order(shared_dir):
    folder = shared_dir / "data" / "originals"
    checked = 0
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" or path.name == "corrupted.mp4":
            continue
        with VideoReader(path) as reader:
            wanted = np.linspace(0, len(reader) - 1, 4).astype(int)
            ours = reader.read(wanted)
            reference = np.stack([pixels for _, pixels in reader.walk()])
            assert len(reference) == len(reader), path.name
        np.testing.assert_array_equal(ours, reference[wanted], err_msg=path.name)
        checked += 1
    assert checked == 17


def test_corrupted_original_is_refused(shared_dir):
    path = shared_dir / "data" / "originals" / "corrupted.mp4"
    with pytest.raises(DecodeError, match="corrupt at packet 30"), VideoReader(path) as reader:
        reader.read(np.linspace(0, len(reader) - 1, 8).astype(int))


def test_largest_stream_of_the_original_with_several(shared_dir):
    with VideoReader(shared_dir / "data" / "originals" / "multi_stream.mp4") as reader:
        assert reader.read([0]).shape == (1, 270, 480, 3)
