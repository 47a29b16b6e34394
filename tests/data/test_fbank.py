"""The audio front end: frames, scales, padding, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from iv2_jax.data import fbank
from iv2_jax.errors import ConfigError, DataError


def _tone(hertz, samples=fbank.SAMPLE_RATE):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / fbank.SAMPLE_RATE)


def test_ten_seconds_are_998_frames():
    assert fbank.CLIP_FRAMES == 998
    assert fbank.num_frames(fbank.CLIP_SAMPLES) == 998
    assert fbank.num_frames(400) == fbank.num_frames(559) == 1
    assert fbank.num_frames(560) == 2
    assert fbank.fbank(np.zeros((3, 1000))).shape == (3, 4, 64)


@pytest.mark.parametrize("hertz", [150.0, 440.0, 1000.0, 3000.0, 7000.0])
def test_a_tone_is_loudest_in_its_mel_bin(hertz):
    energy = fbank.log_mel(_tone(hertz), 64)
    mels = 1127 * np.log1p(np.array([20.0, 8000.0, hertz]) / 700)
    place = (mels[2] - mels[0]) / (mels[1] - mels[0]) * 65 - 1  # in bins, between centres
    assert np.abs(energy.argmax(axis=1) - place).max() < 1


def test_twice_the_amplitude_is_four_times_the_energy():
    rng = np.random.default_rng(0)
    waveform = 0.1 * rng.normal(size=2000)
    difference = fbank.log_mel(2 * waveform) - fbank.log_mel(waveform)
    np.testing.assert_allclose(difference, np.log(4), atol=1e-5)


def test_an_offset_does_not_count():
    rng = np.random.default_rng(1)
    waveform = 0.1 * rng.normal(size=2000)
    np.testing.assert_allclose(
        fbank.log_mel(waveform + 0.3), fbank.log_mel(waveform), rtol=0, atol=1e-4
    )


def test_frames_do_not_see_each_other():
    rng = np.random.default_rng(2)
    waveform = 0.1 * rng.normal(size=1200)
    louder = waveform.copy()
    louder[800:] *= 5
    change = np.abs(fbank.log_mel(louder) - fbank.log_mel(waveform)).max(axis=1)
    starts = fbank.FRAME_SHIFT * np.arange(len(change))
    assert (change[starts + fbank.FRAME_LENGTH <= 800] == 0).all()
    assert (change[starts + fbank.FRAME_LENGTH > 800 + fbank.FRAME_SHIFT] > 0).all()


def test_batches_are_rows():
    rng = np.random.default_rng(3)
    waveforms = rng.normal(size=(2, 3, 900))
    whole = fbank.fbank(waveforms, 16)
    assert whole.dtype == np.float32
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(whole[i, j], fbank.fbank(waveforms[i, j], 16), atol=1e-6)


def test_silence_of_audio_files_is_their_floor():
    padded = fbank.clip_features(_tone(440, 4000), pad="waveform")
    assert padded.shape == (998, 64)
    np.testing.assert_allclose(padded[-1], -2.3917, atol=1e-4)
    assert padded[:20].max() > 0


def test_silence_of_sound_tracks_is_zero():
    waveform = _tone(440, 4000)
    features = fbank.clip_features(waveform)
    count = fbank.num_frames(4000)
    np.testing.assert_array_equal(features[:count], fbank.fbank(waveform))
    assert (features[count:] == 0).all()
    assert (fbank.clip_features(None) == 0).all()
    assert (fbank.clip_features(waveform[:100]) == 0).all()


def test_longer_audio_is_cut():
    waveform = _tone(300, fbank.CLIP_SAMPLES + 5000)
    for pad in ("features", "waveform"):
        whole = fbank.clip_features(waveform, pad=pad)
        np.testing.assert_array_equal(whole, fbank.fbank(waveform[: fbank.CLIP_SAMPLES]))


def test_misuse_is_refused():
    with pytest.raises(DataError, match="399 samples is shorter than one window of 400"):
        fbank.fbank(np.zeros(399))
    with pytest.raises(DataError, match=r"\(2, 800\): mix it to one channel"):
        fbank.clip_features(np.zeros((2, 800)))
    with pytest.raises(ConfigError, match="pad='zeros'"):
        fbank.clip_features(np.zeros(800), pad="zeros")


def test_import_brings_no_jax():
    code = "import sys, iv2_jax.data.fbank; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
