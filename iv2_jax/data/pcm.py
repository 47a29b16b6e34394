"""Samples of decoded sound: any format to float32, any channels to one, any rate to 16 kHz."""

from __future__ import annotations

import math

import av
import numpy as np

from iv2_jax.data.decode import DecodeError
from iv2_jax.data.fbank import SAMPLE_RATE

_HALF, _ROOT = 0.5, math.sqrt(0.5)
_BEHIND = ("BL", "BR", "SL", "SR", "TFL", "TFR", "TBL", "TBR", "TSL", "TSR")
_WEIGHTS = {  # a loudspeaker's share of the mean of a stereo downmix; subwoofers have none
    **dict.fromkeys(("FL", "FR", "FLC", "FRC", "DL", "DR", "WL", "WR", "BC"), _HALF),
    **dict.fromkeys(("FC", "TFC"), _ROOT),
    **dict.fromkeys(_BEHIND, _HALF * _ROOT),
    **dict.fromkeys(("LFE", "LFE2"), 0.0),
}

_UNSAFE_PLANES = 8  # PyAV 18 reads past the planes of frames with so many and crashes


def stored_array(frame: av.AudioFrame, name: str = "<frame>") -> np.ndarray:
    """Samples as they are stored: (channels, samples) planar, (1, samples * channels) packed.

    Raises:
      DecodeError: NumPy has no such samples.
    """
    if frame.format.is_planar and frame.layout.nb_channels >= _UNSAFE_PLANES:
        packer = av.AudioResampler(frame.format.packed.name, frame.layout, frame.sample_rate)
        packed = [f.to_ndarray() for f in [*packer.resample(frame), *packer.resample(None)]]
        return np.concatenate(packed, axis=1).reshape(-1, frame.layout.nb_channels).T
    try:
        return frame.to_ndarray()
    except (ValueError, KeyError) as e:
        raise DecodeError(name, f"its sound has samples of format {frame.format.name}") from e


def to_planes(frame: av.AudioFrame, name: str = "<frame>") -> np.ndarray:
    """(channels, samples) float32 in [-1, 1] of a frame of any sample format.

    Raises:
      DecodeError: a sample is no finite number, or the format is not known.
    """
    stored = stored_array(frame, name)
    if not frame.format.is_planar:
        stored = stored.reshape(-1, frame.layout.nb_channels).T
    if stored.dtype.kind == "f":
        if not np.isfinite(stored).all():
            raise DecodeError(name, "its sound has samples that are not finite numbers")
        return stored.astype(np.float32)
    half = 1 << (8 * stored.dtype.itemsize - 1)
    shift = half if stored.dtype.kind == "u" else 0
    return ((stored.astype(np.float64) - shift) / half).astype(np.float32)


def mix_weights(channels: tuple[str, ...]) -> np.ndarray:
    """(channels,) float32 weights, of sum one, that mix channels of these names into one.

    Where a name is not known every channel weighs the same, as for a single channel.
    """
    weights = np.array([_WEIGHTS.get(name, np.nan) for name in channels])
    if not np.isfinite(weights).all() or weights.sum() == 0:
        weights = np.ones(len(channels))
    return (weights / weights.sum()).astype(np.float32)


def to_mono(frame: av.AudioFrame, name: str = "<frame>") -> np.ndarray:
    """(samples,) float32: the channels of a frame mixed into one.

    Raises:
      DecodeError: see `to_planes`.
    """
    planes = to_planes(frame, name)
    if len(planes) == 1:
        return planes[0]
    return mix_weights(tuple(channel.name for channel in frame.layout.channels)) @ planes


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """(n,) float32 at `rate` Hz -> (round(n * 16000 / rate),) at 16 kHz, by libswresample."""
    if rate == SAMPLE_RATE or not len(samples):
        return samples
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(samples, np.float32)[None], format="fltp", layout="mono"
    )
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
    parts = [f.to_ndarray()[0] for f in [*resampler.resample(frame), *resampler.resample(None)]]
    out = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    wanted = round(len(samples) * SAMPLE_RATE / rate)
    if len(out) < wanted:  # the filter keeps a few at the end
        out = np.pad(out, (0, wanted - len(out)))
    return out[:wanted]
