"""Sound of a row as log-mel features."""

from __future__ import annotations

import numpy as np

from iv2_jax.data import audio, fbank
from iv2_jax.data.decode import DecodeError
from iv2_jax.data.modalities import AudioConfig
from iv2_jax.data.sources import ClipSource

_SILENCE = 2.0**-15  # a track that never gets louder than one step of 16 bits says nothing


def feature_shape(config: AudioConfig) -> tuple[int, int]:
    """(frames, mels) of the features."""
    return fbank.num_frames(fbank.clip_samples(config.seconds)), config.num_mels


def load(
    source: ClipSource,
    index: int,
    config: AudioConfig,
    rng: np.random.Generator | None,
    warnings: list[str],
) -> tuple[np.ndarray, bool]:
    """Features of a clip's sound.

    Args:
      source: the clips.
      index: which.
      config: how.
      rng: source of the draw of a random crop; None in evaluation, which takes the first stretch.
      warnings: sentences about damage that was passed over are appended.

    Returns:
      (frames, mels) float32, zeros where there is no sound; and whether the row counts as one that
      has sound.

    Raises:
      DecodeError: there is a sound stream, and it cannot be used.
    """
    sound = source.sound(index)
    where = {"start": sound.start, "end": sound.end, "name": sound.name, "warnings": warnings}
    if rng is not None and config.crop == "random" and not config.released:
        waveform = audio.load_crop(sound.source, config.seconds, rng, **where)
    else:
        waveform = audio.load_waveform(sound.source, released=config.released, **where)
    if waveform is not None and config.silent == "mask":
        # A waveform can be empty only in the released ways of reading.
        waveform = None if np.abs(waveform).max(initial=0.0) < _SILENCE else waveform
    features = audio.clip_fbank(
        waveform,
        rng=rng,
        num_mels=config.num_mels,
        pad=config.pad,
        seconds=config.seconds,
        crop="first" if rng is None and config.crop == "random" else config.crop,
        from_video=sound.from_video,
    )
    return features, waveform is not None or config.missing == "zeros"


def load_or_none(
    source: ClipSource,
    index: int,
    config: AudioConfig,
    rng: np.random.Generator | None,
    warnings: list[str],
) -> tuple[np.ndarray, bool, str]:
    """As `load`; for sound that cannot be used zeros, and the reason instead of an error."""
    try:
        return (*load(source, index, config, rng, warnings), "")
    except DecodeError as e:
        return np.zeros(feature_shape(config), np.float32), config.missing == "zeros", e.reason
