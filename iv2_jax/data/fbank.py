"""Log-mel spectra of audio for the audio encoder, after Kaldi's recipe, in NumPy alone.

The encoder takes `(frames, 64)` normalised log-mel energies, a frame every 10 ms (spec stage2
5.1). Everything is computed in float64 and rounded once: the logarithm of a small energy magnifies
float32's errors, and the spectrum of ten seconds costs milliseconds either way.
"""

from __future__ import annotations

import functools

import numpy as np

from iv2_jax.errors import ConfigError, DataError

SAMPLE_RATE = 16_000  # samples a second
FRAME_LENGTH = 400  # samples, 25 ms
FRAME_SHIFT = 160  # samples, 10 ms
FFT_LENGTH = 512  # the frame, zero-padded to a power of two
NUM_MELS = 64  # the released loader's; the audio encoder's own front end has 128
PADS = ("features", "waveform")  # what is filled up when a clip is too short
CLIP_SECONDS = 10.0
CLIP_SAMPLES = 10 * SAMPLE_RATE
CLIP_FRAMES = 1 + (CLIP_SAMPLES - FRAME_LENGTH) // FRAME_SHIFT  # 998

# Mean and twice the deviation that features are normalised by, as released: constants measured
# for 128 mel bins, which the released loader applies to its 64.
MEAN = 15.41663
SCALE = 2 * 6.55582

_LOW_HZ, _HIGH_HZ = 20.0, SAMPLE_RATE / 2
_PREEMPHASIS = 0.97
_ENERGY_FLOOR = float(np.finfo(np.float32).eps)
_PCM_SCALE = 2.0**15  # Kaldi works on 16-bit samples


def num_frames(num_samples: int) -> int:
    """Frames of a waveform; only whole windows count.

    Raises:
        DataError: the waveform is shorter than one window.
    """
    if num_samples < FRAME_LENGTH:
        raise DataError(
            f"audio of {num_samples} samples is shorter than one window of {FRAME_LENGTH}; "
            f"pad it (a whole clip has {CLIP_SAMPLES} samples at {SAMPLE_RATE} Hz)"
        )
    return 1 + (num_samples - FRAME_LENGTH) // FRAME_SHIFT


def log_mel(waveform: np.ndarray, num_mels: int = NUM_MELS) -> np.ndarray:
    """Log-mel energies of a waveform: Kaldi's `fbank` with a Povey window and no dither.

    Args:
        waveform: `(..., samples)` in [-1, 1], mono, 16 kHz.
        num_mels: number of mel bins.

    Returns:
        `(..., frames, num_mels)` float32, natural logarithms of energies on the 16-bit scale.

    Raises:
        DataError: the waveform is shorter than one window.
    """
    waveform = np.asarray(waveform, np.float64) * _PCM_SCALE
    count = num_frames(waveform.shape[-1])
    windows = np.lib.stride_tricks.sliding_window_view(waveform, FRAME_LENGTH, axis=-1)
    frames = windows[..., ::FRAME_SHIFT, :][..., :count, :]
    frames = frames - frames.mean(axis=-1, keepdims=True)
    # The sample before a frame's first is taken to be equal to it.
    before = np.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    frames = (frames - _PREEMPHASIS * before) * _window()
    power = np.abs(np.fft.rfft(frames, FFT_LENGTH)) ** 2
    energy = power[..., :-1] @ _mel_filters(num_mels).T
    return np.log(np.maximum(energy, _ENERGY_FLOOR)).astype(np.float32)


def fbank(waveform: np.ndarray, num_mels: int = NUM_MELS) -> np.ndarray:
    """What the audio encoder takes: `log_mel`, normalised.

    Args:
        waveform: `(..., samples)` in [-1, 1], mono, 16 kHz.
        num_mels: number of mel bins; stage 2 uses 64, the encoder's own front end 128.

    Returns:
        `(..., frames, num_mels)` float32.

    Raises:
        DataError: the waveform is shorter than one window.
    """
    return normalize(log_mel(waveform, num_mels))


def normalize(energies: np.ndarray) -> np.ndarray:
    """Normalises log-mel energies (any shape) as the released loaders do; float32."""
    return ((energies - MEAN) / SCALE).astype(np.float32)


def clip_samples(seconds: float) -> int:
    """Samples of a clip of so many seconds.

    Raises:
        ConfigError: not even one window fits into it.
    """
    if not np.isfinite(seconds) or round(seconds * SAMPLE_RATE) < FRAME_LENGTH:
        least = FRAME_LENGTH / SAMPLE_RATE
        raise ConfigError(f"audio.seconds={seconds}: at least one window of {least} s is needed")
    return round(seconds * SAMPLE_RATE)


def clip_features(
    waveform: np.ndarray | None,
    *,
    pad: str = "features",
    num_mels: int = NUM_MELS,
    seconds: float = CLIP_SECONDS,
) -> np.ndarray:
    """Features of one clip, always the frames of `seconds` (998 for ten).

    The released loaders pad in two ways (spec stage2 5.1): an audio file's waveform is padded
    with silence, whose features are about -2.39; the features of a video's sound track are padded
    with zeros, and a video without sound is all zeros. Longer audio is cut at its end.

    Args:
        waveform: `(samples,)` in [-1, 1], mono, 16 kHz; None where there is no sound.
        pad: 'waveform' (audio files) or 'features' (sound tracks of videos).
        num_mels: number of mel bins.
        seconds: length of the clip.

    Returns:
        `(frames, num_mels)` float32.

    Raises:
        ConfigError: `pad` is neither, or `seconds` is below one window.
        DataError: the waveform is not one channel.
    """
    if pad not in PADS:
        raise ConfigError(f"pad={pad!r}: choose 'waveform' or 'features'")
    samples = clip_samples(seconds)
    out = np.zeros((num_frames(samples), num_mels), np.float32)
    if waveform is None:
        return out
    waveform = np.asarray(waveform)
    if waveform.ndim != 1:
        raise DataError(f"audio of shape {waveform.shape}: mix it to one channel, (samples,)")
    waveform = waveform[:samples]
    if pad == "waveform":
        return fbank(np.pad(waveform, (0, samples - len(waveform))), num_mels)
    if len(waveform) >= FRAME_LENGTH:
        features = fbank(waveform, num_mels)
        out[: len(features)] = features
    return out


@functools.cache
def _window() -> np.ndarray:
    """The Povey window: a symmetric Hann window to the power 0.85."""
    return np.hanning(FRAME_LENGTH) ** 0.85


def _mel(hertz: np.ndarray | float) -> np.ndarray:
    return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)


@functools.cache
def _mel_filters(num_mels: int) -> np.ndarray:
    """Triangles `(num_mels, 256)` evenly spaced in mel; the bin at Nyquist has no weight."""
    edges = np.linspace(_mel(_LOW_HZ), _mel(_HIGH_HZ), num_mels + 2)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = _mel(np.arange(FFT_LENGTH // 2) * (SAMPLE_RATE / FFT_LENGTH))
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling))
