"""What a chat model sees of files of all kinds, and what is said about those it cannot see."""

from __future__ import annotations

import av
import numpy as np
import pytest
from PIL import Image

from iv2_jax.data.decode import DecodeError
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.tiles import TilingConfig
from iv2_jax.errors import DataError
from iv2_jax.talk.clip import SoughtVideo, clock, open_clip, see
from tests.data import clips

TALK = TalkConfig("letters", frames=4, size=28)


def test_frames_and_their_times(tmp_path):
    clip = see(clips.write_clip(tmp_path / "a.mp4", 24), TALK)
    assert (clip.kind, clip.views.shape, clip.views.dtype) == ("video", (1, 4, 28, 28, 3), np.uint8)
    assert clips.numbers(np.stack(clip.frames)) == list(clip.numbers)
    np.testing.assert_allclose(clip.times, np.array(clip.numbers) / 25, atol=1e-3)
    assert clip.seconds == pytest.approx(24 / 25, abs=0.01)
    assert clip.describe().startswith("4 frames of 1.0 s, at 0.1 s, ")


def test_a_video_of_one_frame(tmp_path):
    clip = see(clips.write_clip(tmp_path / "a.mp4", [9]), TALK)
    assert clip.views.shape == (1, 4, 28, 28, 3)
    assert clip.numbers == (0, 0, 0, 0)
    assert clips.numbers(np.stack(clip.frames)) == [9] * 4


def test_pictures_and_folders_of_them(tmp_path):
    picture = tmp_path / "a.png"
    Image.fromarray(clips.picture(5, 640, 480)).save(picture)
    clip = see(picture, TALK)
    assert (clip.kind, clip.views.shape) == ("image", (1, 1, 28, 28, 3))
    assert clip.frames[0].shape == (240, 320, 3)  # made smaller for people
    assert (clip.captions, clip.times) == (["picture"], None)
    clip = see(tmp_path, TALK)
    assert (clip.kind, clip.captions) == ("video", ["frame 0"] * 4)
    assert clip.describe() == "4 of the folder's frames: 0, 0, 0, 0"


def test_tiles(tmp_path):
    path = clips.write_clip(tmp_path / "a.mp4", 8, size=(112, 56))
    clip = see(path, TalkConfig("letters", frames=4, size=28, tiling=TilingConfig(28)))
    assert clip.views.shape == (3, 4, 28, 28, 3)  # two side by side, and the whole
    assert clip.describe().endswith("3 views each (tiles and the whole)")


def _grey_film(path, seconds, codec="libx264"):
    """A film of a frame a second, brighter and brighter."""
    with av.open(path, "w") as output:
        stream = output.add_stream(codec, rate=1, options={"preset": "ultrafast", "g": "600"})
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for second in range(seconds):
            grey = np.full((24, 16), 40 + 160 * second // seconds, np.uint8)
            grey[16:] = 128
            output.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="yuv420p")))
        output.mux(stream.encode(None))
    return path


def test_three_hours_are_sought_not_read(tmp_path, monkeypatch):
    path = str(_grey_film(tmp_path / "film.mkv", 3 * 3600))
    film = open_clip(path)
    assert isinstance(film, SoughtVideo)
    assert len(film) == 3 * 3600
    decoded = []
    monkeypatch.setattr(SoughtVideo, "_frames", _counted(SoughtVideo._frames, decoded))
    clip = see(path, TALK)
    film.close()
    assert clip.seconds == pytest.approx(3 * 3600, abs=2)
    assert clip.captions == [clock(number) for number in clip.numbers]
    assert clip.describe().startswith("4 frames of 3:00:00, at 22:29, ")
    shown = [float(frame.mean()) for frame in clip.frames]
    wanted = [(24 + 160 * number / 10800) * 255 / 219 for number in clip.numbers]
    np.testing.assert_allclose(shown, wanted, atol=3)
    assert 0 < len(decoded) <= 4 * 602  # from the keyframe before each, no more


def _counted(frames, decoded):
    """The method, noting every frame it gives."""

    def counted(self, *args):
        for frame in frames(self, *args):
            decoded.append(frame.pts)
            yield frame

    return counted


def test_a_long_film_that_is_cut_off(tmp_path):
    path = _grey_film(tmp_path / "film.mkv", 1200)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    clip = see(path, TALK)
    assert len(clip.notes) == 2
    assert clip.notes[1].startswith("has no frame at 17:28: the one at ")
    assert clip.frames[2].mean() == clip.frames[3].mean() > clip.frames[1].mean() + 10


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("gone.mp4", None, r"gone\.mp4: does not exist"),
        ("empty.mp4", b"", r"empty\.mp4: is empty \(zero bytes\)"),
        ("junk.mp4", bytes(range(256)) * 40, r"junk\.mp4: cannot be opened: "),
        ("junk.png", b"\x89PNG\r\n\x1a\n" + bytes(99), r"junk\.png: is not a readable picture"),
        ("gone.png", None, r"gone\.png: .*[Nn]o such file|gone\.png: does not exist"),
        ("a\0b.mp4", None, r"a\\0b\.mp4: is no path"),
    ],
)
def test_files_that_cannot_be_seen(tmp_path, name, contents, message):
    path = str(tmp_path / name) if "\0" not in name else name
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(DecodeError, match=message):
        see(path, TALK)


def test_other_things_than_clips(tmp_path):
    with pytest.raises(DecodeError, match=r"has no video stream \(it has: audio\)"):
        see(clips.write_sound(tmp_path / "sound.mp4"), TALK)
    with pytest.raises(DecodeError, match=r"is a folder; .* such as sound\.mp4"):
        see(tmp_path, TALK)
    (tmp_path / "none").mkdir()
    with pytest.raises(DecodeError, match="holds no pictures"):
        see(tmp_path / "none", TALK)
    with pytest.raises(DataError, match="give the path of a clip"):
        see("  ", TALK)
    with pytest.raises(DecodeError, match="is no regular file"):
        see("/dev/null", TALK)


def test_a_damaged_clip(tmp_path):
    path = clips.write_clip(tmp_path / "a.mp4", 200, size=(128, 96))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3 : len(whole) // 2] = bytes(len(whole) // 2 - len(whole) // 3)
    path.write_bytes(whole)
    with pytest.raises(DecodeError, match=r"a\.mp4: is corrupt at packet \d+ of 200"):
        see(path, TALK)


def test_times_as_people_write_them():
    assert [clock(s) for s in (0, 3.25, 59.94, 60, 754, 10799)] == [
        "0.0 s", "3.2 s", "59.9 s", "1:00", "12:34", "2:59:59",
    ]  # fmt: skip
