"""Encodes tones with PyAV: any container, codec, rate, layout and sample format."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

from tests.data import clips

_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


def tone(hertz: float, seconds: float, rate: int, *, loud: float = 0.5) -> np.ndarray:
    """(samples,) float32 of a sine."""
    at = np.arange(round(seconds * rate)) / rate
    return (loud * np.sin(2 * np.pi * hertz * at)).astype(np.float32)


def stored(planes: np.ndarray, sample_format: str) -> np.ndarray:
    """(channels, samples) float as a frame of this format holds them."""
    dtype = np.dtype(av.audio.frame.format_dtypes[sample_format])
    if dtype.kind == "i":
        half = 1 << (8 * dtype.itemsize - 1)
        planes = np.clip(np.rint(planes.astype(np.float64) * half), -half, half - 1)
    elif dtype.kind == "u":
        planes = np.clip(np.rint(planes.astype(np.float64) * 128) + 128, 0, 255)
    planes = planes.astype(dtype)
    if sample_format.endswith("p"):
        return np.ascontiguousarray(planes)
    return np.ascontiguousarray(planes.T.reshape(1, -1))


def frame_of(
    planes: np.ndarray, rate: int, *, layout: str = "", sample_format: str = "fltp"
) -> av.AudioFrame:
    """One frame of these (channels, samples)."""
    layout = layout or _LAYOUTS[len(planes)]
    frame = av.AudioFrame.from_ndarray(stored(planes, sample_format), sample_format, layout)
    frame.sample_rate = rate
    return frame


def write_sound(
    path: Path,
    planes: np.ndarray,
    rate: int,
    *,
    codec: str,
    layout: str = "",
    sample_format: str = "",
    pictures: int = 0,
    fps: int = 25,
    delay: float = 0.0,
    file_options: dict[str, str] | None = None,
) -> Path:
    """Encodes (channels, samples), or (samples,), with `pictures` pictures before them in the file.

    Args:
      path: where to; its extension chooses the container.
      planes: samples in [-1, 1].
      rate: Hz.
      codec: FFmpeg's name of the encoder.
      layout: FFmpeg's name; by the number of channels if empty.
      sample_format: of the encoder, its first one if empty.
      pictures: frames of a video stream that show their number.
      fps: of that stream.
      delay: seconds after the first picture at which the sound begins.
      file_options: of the container.
    """
    planes = np.atleast_2d(planes)
    with av.open(path, "w", options=file_options or {}) as output:
        video = output.add_stream("libx264", rate=fps) if pictures else None
        sound = output.add_stream(codec, rate=rate)
        sound.codec_context.layout = layout or _LAYOUTS[len(planes)]
        kinds = [f.name for f in sound.codec_context.codec.audio_formats or ()]
        sample_format = sample_format or kinds[0]
        sound.codec_context.format = sample_format
        if len(planes) >= 8:  # PyAV cannot make such planar frames; the encoder's are made of these
            sample_format = "flt"
        sound.codec_context.open()
        if video is not None:
            video.width, video.height, video.pix_fmt = clips.WIDTH, clips.HEIGHT, "yuv420p"
            for number in range(pictures):
                frame = av.VideoFrame.from_ndarray(clips.picture(number), format="rgb24")
                output.mux(video.encode(frame))
            output.mux(video.encode(None))
        step = sound.codec_context.frame_size or 1024
        for at in range(0, planes.shape[1], step):
            part = planes[:, at : at + step]
            frame = frame_of(
                part, rate, layout=sound.codec_context.layout.name, sample_format=sample_format
            )
            frame.pts = at + round(delay * rate)
            frame.time_base = sound.codec_context.time_base
            output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    return path


def loudest(waveform: np.ndarray, rate: int = 16000) -> float:
    """Hz of the strongest partial of (samples,)."""
    power = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return float(power.argmax() * rate / len(waveform))


def level(waveform: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
