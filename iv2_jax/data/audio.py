"""Sound of a clip with PyAV: one channel at 16 kHz on the time axis of its pictures.

Rules:

* Of several sound streams FFmpeg's best is taken, which the file's default flag decides first.
* Second 0 is where `decode.VideoReader` has it: the first picture, or the first sample of a file
  without pictures. What begins later is preceded by silence, gaps in the middle are silence.
* Channels are weighted by where their loudspeaker stands, as a stereo downmix would, and the
  weights add up to one, so that nothing clips. Two channels give their mean.
* Rates are changed by libswresample.
* What can be read of a damaged file is used and the damage is reported. A stretch without a single
  sample, more damaged packets than sound ones, and samples that are no numbers are errors.
"""

from __future__ import annotations

import contextlib
import logging
import os

import av
import numpy as np

from iv2_jax.data import fbank
from iv2_jax.data.containers import DecodeError, open_container
from iv2_jax.data.sound_reader import ReleasedReader, SoundReader, can_be_entered
from iv2_jax.errors import ConfigError, nearest

logger = logging.getLogger(__name__)

SAMPLE_RATE = fbank.SAMPLE_RATE
CROPS = ("random", "first", "center")
PADS = ("auto", *fbank.PADS)

_SEEK_SECONDS = 5.0  # a stretch that starts later than this is sought
_LONG = 3  # times the stretch that is wanted; shorter sound is decoded whole


def load_waveform(
    source: str | os.PathLike[str] | bytes,
    *,
    start: float | None = None,
    end: float | None = None,
    name: str = "",
    warnings: list[str] | None = None,
    released: bool = False,
) -> np.ndarray | None:
    """Decodes the sound of a file, or of a stretch of it.

    Args:
      source: path, or the bytes of a file, of any container and codec that FFmpeg reads.
      start: first second of the stretch, on the pictures' time axis; None for the beginning.
      end: second at which it ends (not included), None for the end of the sound.
      name: name for messages; the path by default.
      warnings: sentences about damage that was passed over are appended; None logs them.
      released: what the released loaders do (spec stage2 5.1, trap 11.22), for reproduction only.
        Sound of a video: the first stream, in whole packets; integer samples keep their range, so
        16-bit sound is 32768 times too loud; interleaved channels are taken for one channel, twice
        as long. Both there and in sound files two channels give their mean and any other number
        its first channel; sound files that are not stereo are cut to their first ten seconds.

    Returns:
      (samples,) float32 in [-1, 1] at 16 kHz, shorter than the stretch where the sound ends early;
      None when the file has no sound stream.

    Raises:
      DecodeError: the file does not open, or the stretch has no usable sound; with the reason.
    """
    if start is not None and end is not None and end <= start:
        raise DecodeError(name or _name(source), f"the stretch {start} s to {end} s is empty")
    name = name or _name(source)
    notes: list[str] = []
    reader = ReleasedReader if released else SoundReader
    may_seek = (True, False) if start is not None and start > _SEEK_SECONDS else (False,)
    samples = None
    for seek in may_seek:
        with contextlib.closing(open_container(source, name)) as container:
            stream = container.streams.best("audio")
            if released and stream is not None:
                stream = container.streams.audio[0]
            if stream is None:
                return None
            if stream.codec_context is None:
                raise DecodeError(name, "there is no decoder for its sound")
            notes.clear()
            samples = reader(container, stream, name, start, end, notes).read(seek=seek)
            if samples is not None:
                break
    for note in notes:
        if warnings is None:
            logger.warning("%s: %s", name, note)
        else:
            warnings.append(note)
    return samples


def load_crop(
    source: str | os.PathLike[str] | bytes,
    seconds: float,
    rng: np.random.Generator,
    *,
    start: float | None = None,
    end: float | None = None,
    name: str = "",
    warnings: list[str] | None = None,
) -> np.ndarray | None:
    """A random stretch of `seconds`, or all of shorter sound, as `load_waveform` gives it.

    Of long sound whose file says how long it is only that stretch is decoded; where that fails, or
    the sound is not much longer, all of it is.

    Args:
      source: path, or the bytes of a file.
      seconds: length of the stretch.
      rng: source of the draw.
      start: first second that may be taken, None for the beginning.
      end: second at which it ends (not included), None for the end of the sound.
      name: name for messages; the path by default.
      warnings: see `load_waveform`.

    Returns:
      (samples,) float32 in [-1, 1] at 16 kHz, or None, as `load_waveform`.

    Raises:
      DecodeError: see `load_waveform`.
    """
    wanted = fbank.clip_samples(seconds)
    given = {"name": name, "warnings": warnings}
    length = _promised(source, name or _name(source))
    first = start or 0.0
    last = length if end is None or length is None else min(end, length)
    if last is not None and last - first > _LONG * seconds:
        at = first + int(rng.integers(int((last - first) * SAMPLE_RATE) - wanted)) / SAMPLE_RATE
        with contextlib.suppress(DecodeError):  # a hole, or a wrong length: all of it then
            part = load_waveform(source, start=at, end=at + seconds, **given)
            if part is None or len(part) == wanted:
                return part
    waveform = load_waveform(source, start=start, end=end, **given)
    return None if waveform is None else _crop(waveform, wanted, "random", rng)


def _promised(source: str | os.PathLike[str] | bytes, name: str) -> float | None:
    """Seconds of sound that a file says it has, where it can be entered in the middle."""
    with contextlib.closing(open_container(source, name)) as container:
        stream = container.streams.best("audio")
        if stream is None or not can_be_entered(container):
            return None
        if stream.duration is not None and stream.time_base:
            return float(stream.duration * stream.time_base)
        return container.duration / av.time_base if container.duration else None


def clip_fbank(
    waveform: np.ndarray | None,
    *,
    rng: np.random.Generator | None = None,
    num_mels: int = fbank.NUM_MELS,
    pad: str = "auto",
    seconds: float = fbank.CLIP_SECONDS,
    crop: str = "random",
    from_video: bool = True,
) -> np.ndarray:
    """What the audio encoder takes of one clip, always `seconds` long (spec stage2 5.1).

    Args:
      waveform: (samples,) from `load_waveform`; None gives zeros.
      rng: source of the draw of a random crop; None in evaluation, where `random` takes the middle.
      num_mels: number of mel bins.
      pad: what follows sound that is too short: `features` (zeros), `waveform` (silence, whose
        features are about -2.39), or `auto`: features for videos, the waveform for sound files.
      seconds: length of the clip.
      crop: part of longer sound that is taken: `random`, `first` or `center`.
      from_video: whether the sound is a video's track; for `auto`.

    Returns:
      (frames, num_mels) float32; 998 frames for ten seconds.

    Raises:
      ConfigError: `pad`, `crop` or `seconds` is out of range.
      DataError: the waveform is not one channel.
    """
    for field, value, known in (("pad", pad, PADS), ("crop", crop, CROPS)):
        if value not in known:
            raise ConfigError(f"audio.{field} {value!r} is not known{nearest(value, known)}")
    if pad == "auto":
        pad = "features" if from_video else "waveform"
    if waveform is not None:
        waveform = _crop(np.asarray(waveform), fbank.clip_samples(seconds), crop, rng)
    return fbank.clip_features(waveform, pad=pad, num_mels=num_mels, seconds=seconds)


def _crop(
    waveform: np.ndarray, samples: int, crop: str, rng: np.random.Generator | None
) -> np.ndarray:
    """At most so many samples of it."""
    room = waveform.shape[-1] - samples
    if room <= 0 or crop == "first":
        return waveform[..., :samples]
    at = room // 2 if crop == "center" or rng is None else int(rng.integers(room + 1))
    return waveform[..., at : at + samples]


def _name(source: str | os.PathLike[str] | bytes) -> str:
    """What messages call a source."""
    return "<bytes>" if isinstance(source, bytes) else os.fspath(source)
