"""Encodes a clip anew: cut to its seconds, made smaller, with keyframes close together."""

from __future__ import annotations

import io
import os
import wave
from collections.abc import Iterator
from fractions import Fraction

import av
import av.error
import numpy as np

from iv2_jax.data import audio
from iv2_jax.data.decode import DecodeError, VideoReader
from iv2_jax.data.records import Clip
from iv2_jax.data.sources import open_frames, read_bytes

DEFAULT_GOP = 16  # frames between keyframes (spec realdata 5)
_TIME_BASE = Fraction(1, 90000)
_FOLDER_RATE = 25.0  # frames per second given to folders of frames, which have no clock
_CHUNK = 16  # frames of a folder read at a time
# Three of four frames are B-frames that nothing refers to, so that a reader leaves them out; no
# deblocking and no CABAC, which are a third of decoding. Both together read in 0.44 of the time of
# a stream without B-frames, for 8 % more bytes.
_VIDEO_OPTIONS = {
    "crf": "20",
    "preset": "fast",
    "tune": "fastdecode",
    "bf": "3",
    "x264-params": "b-pyramid=none:b-adapt=0",
}


def encode_clip(
    clip: Clip, *, short_side: int | None = None, gop: int = DEFAULT_GOP, keep_audio: bool = True
) -> bytes:
    """Decodes a clip and encodes it as H.264 (and AAC) in mp4.

    Args:
      clip: the record; its `start` and `end` are where it is cut.
      short_side: bring a longer short side down to this; sizes become even either way.
      gop: a keyframe every so many frames.
      keep_audio: keep the first sound stream, cut alike.

    Returns:
      The bytes of the file.

    Raises:
      DecodeError: the clip does not decode.
    """
    frames = _timed_frames(clip)
    first_time, first = next(frames)
    height, width = _even_size(first.shape[0], first.shape[1], short_side)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", options={**_VIDEO_OPTIONS, "g": str(gop)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = _TIME_BASE
        sound = _Sound(clip, output) if keep_audio else None
        last = -1
        for time, pixels in _chain((first_time, first), frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(width, height, "yuv420p", interpolation="AREA")
            frame.time_base = _TIME_BASE
            frame.pts = last = max(round((time - first_time) / _TIME_BASE), last + 1)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            sound.copy()
    return file.getvalue()


def sound_file(path: str, start: float | None, end: float | None) -> bytes:
    """The bytes of a sound file, or of a stretch of it as WAV (16 kHz, one channel).

    Args:
      path: file or URL.
      start: first second, None for the beginning.
      end: second at which it ends (not included), None for the end.

    Raises:
      DecodeError: there is no sound that decodes.
    """
    data = read_bytes(path)
    samples = audio.load_waveform(data, start=start, end=end, name=path, warnings=[])
    if samples is None:
        raise DecodeError(path, "has no sound stream")
    if start is None and end is None:
        return data
    file = io.BytesIO()
    with wave.open(file, "wb") as output:
        output.setnchannels(1)
        output.setsampwidth(2)
        output.setframerate(audio.SAMPLE_RATE)
        output.writeframes(np.rint(samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _chain(
    first: tuple[float, np.ndarray], rest: Iterator[tuple[float, np.ndarray]]
) -> Iterator[tuple[float, np.ndarray]]:
    """The first frame, then the others."""
    yield first
    yield from rest


def _even_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """(height, width) of the encoded pictures; 4:2:0 needs both even."""
    scale = min(1.0, short_side / min(height, width)) if short_side else 1.0
    return max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2))


def _timed_frames(clip: Clip) -> Iterator[tuple[float, np.ndarray]]:
    """(second, (H, W, 3) uint8) of every frame of the clip, upright."""
    frames = open_frames(clip.path, start=clip.start, end=clip.end, frames=clip.frames)
    try:
        if isinstance(frames, VideoReader):
            yield from frames.walk()
            return
        for start in range(0, len(frames), _CHUNK):
            span = range(start, min(start + _CHUNK, len(frames)))
            yield from zip((i / _FOLDER_RATE for i in span), frames.read(span), strict=True)
    finally:
        frames.close()


class _Sound:
    """The clip's sound as AAC in the same file; sound that does not decode is left out."""

    def __init__(self, clip: Clip, output: av.container.OutputContainer) -> None:
        """Looks for sound; streams must be added before the first packet."""
        self._clip = clip
        self._output = output
        self._stream: av.AudioStream | None = None
        if os.path.isdir(clip.path):
            return
        with _open(clip.path) as file:
            rate = file.streams.audio[0].rate if file.streams.audio else 0
        if rate:
            self._stream = output.add_stream("aac", rate=rate)

    def copy(self) -> None:
        """Decodes, cuts and encodes all of it."""
        if self._stream is None:
            return
        rate = self._stream.rate
        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=rate)
        written = 0
        with _open(self._clip.path) as file:
            for frame in self._frames(file):
                for piece in resampler.resample(frame):
                    piece.pts, piece.time_base = written, Fraction(1, rate)
                    written += piece.samples
                    self._output.mux(self._stream.encode(piece))
        self._output.mux(self._stream.encode(None))

    def _frames(self, file: av.container.InputContainer) -> Iterator[av.AudioFrame]:
        """Sound between the clip's start and end, to the nearest piece of a codec (about 20 ms)."""
        start, end = self._clip.start or 0.0, self._clip.end
        source = file.streams.audio[0]
        origin = float((source.start_time or 0) * (source.time_base or 0))
        for packet in file.demux(source):
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                continue  # broken sound must not cost the pictures
            for frame in decoded:
                time = (frame.time or 0.0) - origin
                if time >= start and (end is None or time < end):
                    frame.pts = None
                    yield frame


def _open(path: str) -> av.container.InputContainer:
    """A file or URL whose pictures were just decoded, opened for its sound."""
    source = io.BytesIO(read_bytes(path)) if "://" in path else path
    return av.open(source, metadata_errors="ignore")
