"""Sound of clips: rates, channels, sample formats, time axis, damage, and the released ways."""

from __future__ import annotations

import logging
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from iv2_jax.data import audio, fbank, pcm
from iv2_jax.data.audio import clip_fbank, load_waveform
from iv2_jax.data.decode import DecodeError, VideoReader
from iv2_jax.errors import ConfigError
from tests.data import clips, sounds
from tests.data.sounds import level, loudest, tone, write_sound


def _error(waveform, expected):
    """Largest difference away from the ends, where filters and codecs have their edges."""
    count = min(len(waveform), len(expected))
    return float(np.abs(waveform[:count] - expected[:count])[400 : count - 400].max())


# -- rates, channels, formats ---------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_a_tone_keeps_pitch_loudness_and_phase_at_any_rate(tmp_path, rate, channels):
    planes = np.stack([tone(440, 1.5, rate)] * channels)
    path = write_sound(tmp_path / "a.wav", planes, rate, codec="pcm_s16le")
    waveform = load_waveform(path)
    assert waveform.dtype == np.float32
    assert abs(len(waveform) - 24000) <= 1
    assert loudest(waveform) == pytest.approx(440, abs=1)
    assert _error(waveform, tone(440, 1.5, 16000)) < 1e-4


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("pcm_u8", "a.wav"),
        ("pcm_s24le", "a.wav"),
        ("pcm_s32le", "a.wav"),
        ("pcm_f32le", "a.wav"),
        ("pcm_f64le", "a.wav"),
        ("flac", "a.flac"),
        ("aac", "a.mp4"),
        ("libmp3lame", "a.mp3"),
        ("libopus", "a.webm"),
        ("mp2", "a.mpg"),
        ("ac3", "a.mkv"),
    ],
)
def test_any_codec_and_sample_format(tmp_path, codec, name):
    planes = np.stack([tone(500, 1, 48000), tone(500, 1, 48000)])
    waveform = load_waveform(write_sound(tmp_path / name, planes, 48000, codec=codec))
    assert loudest(waveform) == pytest.approx(500, abs=1.5)
    assert level(waveform[1000:15000]) == pytest.approx(0.5 / np.sqrt(2), rel=0.06)


def test_frequencies_above_the_new_limit_do_not_come_back_as_others(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(10_000, 1, 48000), 48000, codec="pcm_s16le")
    assert np.abs(load_waveform(path)[400:-400]).max() < 1e-3


@pytest.mark.parametrize("sample_format", ["u8", "s16", "s32", "flt", "dbl"])
@pytest.mark.parametrize("planar", [False, True])
def test_every_sample_format_has_the_same_samples(sample_format, planar):
    planes = np.stack([tone(300, 0.1, 16000), tone(700, 0.1, 16000)])
    kind = sample_format + ("p" if planar else "")
    frame = sounds.frame_of(planes, 16000, sample_format=kind)
    np.testing.assert_allclose(
        pcm.to_planes(frame), planes, atol=1 / 128 if sample_format == "u8" else 1 / 32000
    )


def test_stereo_is_the_mean_of_its_channels(tmp_path):
    left, right = tone(400, 1, 16000), tone(1100, 1, 16000, loud=0.25)
    for planes, expected in (
        ([left, right], (left + right) / 2),
        ([left, left], left),
        ([left, 0 * left], left / 2),
        ([left, -left], 0 * left),
    ):
        path = write_sound(tmp_path / "a.wav", np.stack(planes), 16000, codec="pcm_s16le")
        np.testing.assert_allclose(load_waveform(path), expected, atol=1e-4)


@pytest.mark.parametrize("layout", ["5.1", "5.1(side)", "7.1", "quad", "3.0", "2.1"])
def test_downmix_is_ffmpegs(layout):
    channels = av.AudioLayout(layout).nb_channels
    planes = np.random.default_rng(0).uniform(-1, 1, (channels, 500)).astype(np.float32)
    frame = sounds.frame_of(planes, 16000, layout=layout, sample_format="flt")
    resampler = av.AudioResampler("fltp", "mono", 16000, options={"rematrix_maxval": "1.0"})
    theirs = np.concatenate([f.to_ndarray()[0] for f in resampler.resample(frame)])
    np.testing.assert_allclose(pcm.to_mono(frame), theirs, atol=1e-5)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.webm", "libopus")])
def test_eight_planes(tmp_path, name, codec):  # PyAV's own way to their samples crashes
    planes = np.stack([tone(440, 1, 48000, loud=0.9)] * 8)
    path = write_sound(tmp_path / name, planes, 48000, codec=codec)
    assert level(load_waveform(path)[400:-400]) == pytest.approx(0.9 / np.sqrt(2), rel=0.02)
    assert loudest(load_waveform(path, released=True)) == pytest.approx(440, abs=1)


def test_surround_never_clips_and_keeps_what_is_in_every_channel(tmp_path):
    loud = np.stack([tone(440, 0.5, 48000, loud=0.99)] * 6)
    waveform = load_waveform(write_sound(tmp_path / "a.wav", loud, 48000, codec="pcm_s16le"))
    assert _error(waveform, tone(440, 0.5, 16000, loud=0.99)) < 1e-3
    bass = np.zeros_like(loud)
    bass[3] = loud[3]  # the subwoofer's channel
    waveform = load_waveform(write_sound(tmp_path / "b.wav", bass, 48000, codec="pcm_s16le"))
    assert np.abs(waveform).max() < 1e-3


def test_unknown_loudspeakers_weigh_the_same():
    assert pcm.mix_weights(("FL", "FR")).tolist() == [0.5, 0.5]
    assert pcm.mix_weights(("?", "?", "?", "?")).tolist() == [0.25] * 4
    assert pcm.mix_weights(("LFE",)).tolist() == [1.0]
    assert pcm.mix_weights(("FL", "FR", "LFE")).tolist() == [0.5, 0.5, 0.0]


# -- time axis ------------------------------------------------------------------------------------


def _beeps(seconds):
    """A beep of 25 ms at a quarter past every second, its pitch growing by 100 Hz."""
    out = np.zeros(16000 * seconds, np.float32)
    for at in range(seconds):
        out[at * 16000 + 4000 :][:400] = tone(1000 + 100 * at, 0.025, 16000)
    return out


def _onset(waveform):
    return np.flatnonzero(np.abs(waveform) > 0.2)[0] / 16000


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "aac"), ("a.mkv", "pcm_s16le"), ("a.ts", "aac"), ("a.mkv", "libopus")],
)
@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_stretches_are_cut_as_the_pictures_are(tmp_path, name, codec, delay):
    rate = 48000 if codec == "libopus" else 16000
    sound = np.repeat(_beeps(9), rate // 16000)
    path = write_sound(tmp_path / name, sound, rate, codec=codec, pictures=90, fps=10, delay=delay)
    whole = load_waveform(path)
    assert _onset(whole) == pytest.approx(0.25 + delay, abs=2e-3)
    assert not whole[: round((delay - 0.01) * 16000) if delay else 0].any()
    for start in (2.1, 7.1):  # the second is sought
        part = load_waveform(path, start=start, end=start + 0.8)
        assert len(part) == 12800
        assert start + _onset(part) == pytest.approx(int(start) + 0.25 + delay, abs=2e-3)
        with VideoReader(path, start=start, end=start + 0.8) as reader:
            assert clips.numbers(reader.read([0])) == [round(start * 10)]


def test_sought_and_decoded_in_order_are_the_same(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000 * 9).astype(np.float32)
    for name, codec in (("a.wav", "pcm_s16le"), ("a.flac", "flac"), ("a.mp4", "aac")):
        path = write_sound(tmp_path / name, noise, 16000, codec=codec)
        sought = load_waveform(path, start=6.2, end=7.7)
        with monkeypatch.context() as patch:
            patch.setattr(audio, "_SEEK_SECONDS", 100.0)
            np.testing.assert_array_equal(load_waveform(path, start=6.2, end=7.7), sought)
        np.testing.assert_array_equal(load_waveform(path)[99200:123200], sought)


def test_sound_that_ends_early_is_shorter_than_the_stretch(tmp_path):
    path = write_sound(
        tmp_path / "a.mkv", tone(440, 1, 16000), 16000, codec="pcm_s16le", pictures=40, fps=20
    )
    assert len(load_waveform(path, start=0.5, end=1.5)) == 8000
    with pytest.raises(DecodeError, match=r"has no sound from 1.2 s to 1.8 s"):
        load_waveform(path, start=1.2, end=1.8)
    with pytest.raises(DecodeError, match=r"2.0 s to 1.0 s is empty"):
        load_waveform(path, start=2.0, end=1.0)


def test_a_hole_in_the_timestamps_is_silence(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(path, "w") as output:
        stream = output.add_stream("pcm_s16le", rate=16000)
        stream.codec_context.layout, stream.codec_context.format = "mono", "s16"
        stream.codec_context.open()
        for begin in (0, 48000):
            frame = sounds.frame_of(tone(440, 1, 16000)[None], 16000, sample_format="s16")
            frame.pts, frame.time_base = begin, Fraction(1, 16000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    waveform = load_waveform(path)
    assert len(waveform) == 64000
    assert level(waveform[:16000]) == pytest.approx(level(waveform[48000:]))
    assert level(waveform[:16000]) > 0.3
    assert not waveform[16100:47900].any()


def test_crops_of_long_sound_are_decoded_alone(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000 * 12).astype(np.float32)
    path = write_sound(tmp_path / "a.wav", noise, 16000, codec="pcm_s16le")
    asked = []
    real = audio.load_waveform

    def watched(*given, **options):
        asked.append((options["start"], options["end"]))
        return real(*given, **options)

    whole = real(path)
    monkeypatch.setattr(audio, "load_waveform", watched)
    places = []
    for seed in range(40):
        crop = audio.load_crop(path, 0.5, np.random.default_rng(seed), start=1.0, end=11.0)
        place = round(asked[-1][0] * 16000)
        np.testing.assert_array_equal(crop, whole[place : place + 8000])
        places.append(place)
    assert len(asked) == 40
    assert 16000 <= min(places) < 60000
    assert 120000 < max(places) <= 11 * 16000 - 8000
    audio.load_crop(path, 5.0, np.random.default_rng(0))
    assert asked[-1] == (None, None)  # not long enough to bother
    short = audio.load_crop(path, 5.0, np.random.default_rng(0), start=2.0, end=3.0)
    np.testing.assert_array_equal(short, whole[32000:48000])


def test_crops_fall_back_on_the_whole(tmp_path):
    """The file is cut off: what it says of its length is wrong."""
    options = {"movflags": "faststart"}
    path = write_sound(
        tmp_path / "a.mp4", tone(440, 20, 16000), 16000, codec="aac", file_options=options
    )
    data = path.read_bytes()
    for seed in range(4):
        crop = audio.load_crop(data[: len(data) // 3], 1.0, np.random.default_rng(seed), name="a")
        assert crop.shape == (16000,)
        assert level(crop) > 0.3
    assert (
        audio.load_crop(clips.write_clip(tmp_path / "b.mp4"), 1, np.random.default_rng(0)) is None
    )


# -- nothing, silence, damage ---------------------------------------------------------------------


def test_no_sound_stream_is_none(tmp_path):
    path = clips.write_clip(tmp_path / "a.mp4", 5)
    assert load_waveform(path) is None
    assert load_waveform(path.read_bytes(), released=True) is None


def test_silence_is_sound(tmp_path):
    path = write_sound(tmp_path / "a.wav", np.zeros(16000, np.float32), 16000, codec="pcm_s16le")
    waveform = load_waveform(path)
    assert waveform.shape == (16000,)
    assert not waveform.any()
    features = clip_fbank(waveform, from_video=False)
    assert np.isfinite(features).all()
    np.testing.assert_allclose(features, -2.3917, atol=1e-4)


def test_zero_length(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(440, 1, 16000), 16000, codec="pcm_s16le")
    header = path.read_bytes()[:-32000]
    with pytest.raises(DecodeError, match="no samples"):
        load_waveform(header)
    with pytest.raises(DecodeError, match="zero bytes"):
        load_waveform(b"", name="b")
    with pytest.raises(DecodeError, match="does not exist"):
        load_waveform(tmp_path / "none.wav")
    with pytest.raises(DecodeError, match="is a folder"):
        load_waveform(tmp_path)
    (tmp_path / "text.wav").write_text("no sound at all\n" * 100)
    with pytest.raises(DecodeError, match=r"text\.wav: "):
        load_waveform(tmp_path / "text.wav")


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.wav", "pcm_s16le", {}),
        ("a.mp3", "libmp3lame", {}),
        ("a.mp4", "aac", {"movflags": "faststart"}),
        ("a.mkv", "aac", {}),
        ("a.flac", "flac", {}),
    ],
)
def test_a_cut_file_gives_what_is_there(tmp_path, name, codec, options):
    sound = tone(440, 4, 16000) + np.random.default_rng(0).normal(0, 0.05, 64000)
    path = write_sound(
        tmp_path / name, sound.astype(np.float32), 16000, codec=codec, file_options=options
    )
    data = path.read_bytes()
    notes = []
    part = load_waveform(data[: len(data) // 2], name="cut", warnings=notes)
    assert 1.4 < len(part) / 16000 < 2.6
    assert loudest(part) == pytest.approx(440, abs=2)
    if name == "a.mp4":  # formats that say how long they should be
        assert any("is cut off: its sound ends at" in note for note in notes)
    with pytest.raises(DecodeError, match=r"has no sound from 3.5 s"):
        load_waveform(data[: len(data) // 2], start=3.5, end=3.9, name="cut")


def test_an_mp4_without_its_index_is_refused(tmp_path):
    path = write_sound(tmp_path / "a.mp4", tone(440, 2, 16000), 16000, codec="aac")
    with pytest.raises(DecodeError, match=r"^cut: cannot be opened"):
        load_waveform(path.read_bytes()[:4000], name="cut")


def _damaged(path, share):
    """The file with this share of its sound packets overwritten."""
    data = bytearray(path.read_bytes())
    with av.open(path) as container:
        places = [(p.pos, p.size) for p in container.demux(audio=0) if p.size]
    for i, (at, size) in enumerate(places):
        if (i * 0.618) % 1 < share:
            data[at : at + size] = b"\xff" * size
    return bytes(data)


def test_some_damaged_packets_leave_holes_many_are_an_error(tmp_path, caplog):
    path = write_sound(tmp_path / "a.mp4", tone(440, 4, 16000), 16000, codec="aac")
    notes = []
    waveform = load_waveform(_damaged(path, 0.1), warnings=notes)
    assert len(waveform) == pytest.approx(64000, abs=2048)
    assert any("packets of its sound do not decode" in note for note in notes)
    assert loudest(waveform) == pytest.approx(440, abs=1)
    with caplog.at_level(logging.WARNING, "iv2_jax.data.audio"):
        load_waveform(_damaged(path, 0.1), name="some.mp4")
    assert "some.mp4: " in caplog.text
    with pytest.raises(DecodeError, match=r"its sound is corrupt: .* packets do not decode"):
        load_waveform(_damaged(path, 0.9))


@pytest.mark.parametrize("error", [IndexError("no such stream"), OSError("disk gone")])
def test_reading_that_breaks_off_gives_what_is_there(tmp_path, monkeypatch, error):
    path = write_sound(tmp_path / "a.mp4", tone(440, 4, 16000), 16000, codec="aac")
    real = audio.open_container

    class Breaking:
        """A file of which so many packets can be read."""

        limit = 20

        def __init__(self, *given):
            self._file = real(*given)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def demux(self, stream):
            for count, packet in enumerate(self._file.demux(stream)):
                if count == self.limit:
                    raise error
                yield packet

    monkeypatch.setattr(audio, "open_container", Breaking)
    notes = []
    assert 1.0 < len(load_waveform(path, warnings=notes)) / 16000 < 1.4
    assert f"its sound cannot be read to its end: {error}" in notes
    Breaking.limit = 0
    with pytest.raises(DecodeError, match=f"has no samples .*{error}"):
        load_waveform(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path, bad):
    sound = tone(440, 0.5, 16000)
    sound[3000] = bad
    path = write_sound(tmp_path / "a.wav", sound, 16000, codec="pcm_f32le")
    with pytest.raises(DecodeError, match="not finite"):
        load_waveform(path)


def test_samples_beyond_full_scale_are_cut_to_it(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(440, 0.5, 16000) * 3, 16000, codec="pcm_f32le")
    waveform = load_waveform(path)
    assert waveform.max() == 1
    assert waveform.min() == -1


# -- features -------------------------------------------------------------------------------------


def test_features_have_the_length_of_the_clip():
    waveform = tone(440, 3, 16000)
    assert clip_fbank(waveform).shape == (998, 64)
    assert clip_fbank(waveform, num_mels=128, seconds=2.5).shape == (248, 128)
    assert clip_fbank(None, seconds=2).shape == (198, 64)
    assert not clip_fbank(None).any()
    np.testing.assert_array_equal(clip_fbank(waveform), fbank.clip_features(waveform))
    np.testing.assert_array_equal(
        clip_fbank(waveform, from_video=False), fbank.clip_features(waveform, pad="waveform")
    )


def test_crops_of_longer_sound():
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, 16000 * 3).astype(np.float32)
    first = fbank.fbank(waveform[:16000])
    middle = fbank.fbank(waveform[16000:32000])
    np.testing.assert_array_equal(clip_fbank(waveform, seconds=1, crop="first"), first)
    np.testing.assert_array_equal(clip_fbank(waveform, seconds=1, crop="center"), middle)
    np.testing.assert_array_equal(clip_fbank(waveform, seconds=1), middle)  # evaluation
    drawn = {
        clip_fbank(waveform, seconds=1, rng=np.random.default_rng(seed)).tobytes()
        for seed in range(5)
    }
    assert len(drawn) == 5
    again = clip_fbank(waveform, seconds=1, rng=np.random.default_rng(3))
    np.testing.assert_array_equal(
        again, clip_fbank(waveform, seconds=1, rng=np.random.default_rng(3))
    )


def test_the_first_and_the_last_crop_are_drawn_too():
    waveform = np.arange(402, dtype=np.float32) / 402
    places = {
        audio._crop(waveform, 400, "random", np.random.default_rng(seed))[0] for seed in range(40)
    }
    assert places == {waveform[0], waveform[1], waveform[2]}


def test_misuse_is_refused():
    with pytest.raises(ConfigError, match=r"audio\.pad 'feature'.*did you mean 'features'"):
        clip_fbank(np.zeros(800), pad="feature")
    with pytest.raises(ConfigError, match=r"audio\.crop 'middle'"):
        clip_fbank(np.zeros(800), crop="middle")
    with pytest.raises(ConfigError, match=r"audio\.seconds=0"):
        clip_fbank(np.zeros(800), seconds=0)


# -- the released loaders -------------------------------------------------------------------------


def test_released_sixteen_bit_sound_of_videos_is_not_scaled(tmp_path):
    path = write_sound(
        tmp_path / "a.mkv", tone(440, 1, 16000), 16000, codec="pcm_s16le", pictures=10, fps=10
    )
    right, released = load_waveform(path), load_waveform(path, released=True)
    np.testing.assert_allclose(released, right * 32768, atol=0.5)
    louder = clip_fbank(released)[:98] - clip_fbank(right)[:98]
    np.testing.assert_allclose(louder, 2 * np.log(32768) / fbank.SCALE, atol=0.05)


def test_released_interleaved_channels_of_videos_are_taken_for_one(tmp_path):
    planes = np.stack([tone(440, 1, 16000)] * 2)
    path = write_sound(tmp_path / "a.mkv", planes, 16000, codec="pcm_s16le", pictures=10, fps=10)
    released = load_waveform(path, released=True)
    assert len(released) == 32000
    assert loudest(released) == pytest.approx(220, abs=1)
    planar = write_sound(tmp_path / "b.mp4", planes, 16000, codec="aac", pictures=10, fps=10)
    assert loudest(load_waveform(planar, released=True)) == pytest.approx(440, abs=1)


def test_released_surround_is_its_first_channel(tmp_path):
    planes = np.stack([tone(300 + 200 * i, 1, 48000) for i in range(6)])
    path = write_sound(tmp_path / "a.wav", planes, 48000, codec="pcm_s16le")
    assert _error(load_waveform(path, released=True), tone(300, 1, 16000)) < 1e-3


def test_released_sound_files_that_are_not_stereo_are_cut(tmp_path):
    sound = tone(440, 11, 16000)
    mono = write_sound(tmp_path / "a.wav", sound, 16000, codec="pcm_s16le")
    stereo = write_sound(tmp_path / "b.wav", np.stack([sound] * 2), 16000, codec="pcm_s16le")
    assert len(load_waveform(mono, released=True)) == fbank.CLIP_SAMPLES
    assert len(load_waveform(mono)) == len(load_waveform(stereo, released=True)) == 11 * 16000


# -- real files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("mpeg4_mp3.avi", 6.56),
        ("mpeg1_mp2.mpg", 2.98),
        ("vp8_vorbis.webm", 1.01),
        ("h264_opus.mkv", 10.37),
        ("multi_stream.mp4", 13.06),
        ("failing_audio.mp4", 11.23),
    ],
)
def test_real_tracks(shared_dir, name, seconds):
    waveform = load_waveform(shared_dir / "data" / "originals" / name)
    assert len(waveform) / 16000 == pytest.approx(seconds, abs=0.05)
    assert 0.005 < level(waveform) < 0.3
    half = load_waveform(shared_dir / "data" / "originals" / name, start=0.25, end=0.75)
    assert len(half) == 8000
    # The grid of 16 kHz may lie up to half a sample elsewhere.
    assert np.corrcoef(half, waveform[4000:12000])[0, 1] > 0.99


def test_real_files_without_sound(shared_dir):
    originals = shared_dir / "data" / "originals"
    for name in ("hevc.mp4", "anim.gif", "h264_noaudio.mkv"):
        assert load_waveform(originals / name) is None


def test_real_sound_files(shared_dir):
    files = sorted((shared_dir / "data" / "audio").rglob("*.flac"))
    assert files
    for path in files[::40]:
        waveform = load_waveform(path)
        with av.open(path) as container:
            seconds = container.streams.audio[0].duration * container.streams.audio[0].time_base
        assert len(waveform) == pytest.approx(float(seconds) * 16000, abs=2)
        assert clip_fbank(waveform, from_video=False).shape == (998, 64)


def test_import_brings_no_jax():
    code = "import sys, iv2_jax.data.audio; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
