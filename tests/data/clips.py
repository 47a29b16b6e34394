"""Encodes tiny clips whose pictures show their frame number, so that frames can be told."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_BITS = 8
WIDTH, HEIGHT = 64, 48


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(H, W, 3) uint8: the number as 8 bright or dark stripes, the lowest bit on the left."""
    bits = (number >> np.arange(_BITS)) & 1
    columns = bits[np.arange(width) * _BITS // width]
    grey = np.where(columns, 215, 40).astype(np.uint8)
    return np.broadcast_to(grey[None, :, None], (height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that (T, H, W, 3) pictures show."""
    width = frames.shape[2]
    centres = (np.arange(_BITS) * 2 + 1) * width // (2 * _BITS)
    middle = frames[:, frames.shape[1] // 2, centres].mean(axis=-1) > 128
    return [int(bits @ (1 << np.arange(_BITS))) for bits in middle]


@contextlib.contextmanager
def same_priority() -> Iterator[None]:
    """Puts every thread's scheduling policy back to what this thread's was before.

    SVT-AV1 as root gives the process real-time priority, which other processes wait behind and
    every later child inherits.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        for thread in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                if os.sched_getscheduler(thread) != policy:
                    os.sched_setscheduler(thread, policy, parameters)


def write_clip(
    path: Path,
    frames: int | Iterable[int] = 24,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    rate: int = 25,
    times: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
    rotation: int = 0,
    audio: bool = False,
    file_format: str | None = None,
    file_options: dict[str, str] | None = None,
) -> Path:
    """Encodes a clip.

    Args:
      path: where to.
      frames: how many, or the numbers they show.
      codec: FFmpeg's name of the encoder.
      pix_fmt: pixel format it stores.
      size: (width, height).
      rate: frames per second.
      times: seconds at which each frame is shown, for a variable rate.
      options: of the encoder.
      rotation: display matrix, degrees counter-clockwise; pictures are upright once it is applied.
      audio: add a second of tone.
      file_format: container, by the file's extension if None.
      file_options: of the container.
    """
    shown = range(frames) if isinstance(frames, int) else list(frames)
    turned = rotation % 180 == 90
    width, height = size
    with (
        same_priority(),
        av.open(path, "w", format=file_format, options=file_options or {}) as output,
    ):
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = (height, width) if turned else (width, height)
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = output.add_stream("aac", rate=16000) if audio else None
        for i, number in enumerate(shown):
            upright = picture(number, width, height)
            stored = np.ascontiguousarray(np.rot90(upright, -rotation // 90))
            frame = av.VideoFrame.from_ndarray(stored, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            _write_tone(output, sound)
    return path


def write_sound(path: Path) -> Path:
    """A file with sound and no pictures."""
    with av.open(path, "w") as output:
        _write_tone(output, output.add_stream("aac", rate=16000))
    return path


def _write_tone(output: av.container.OutputContainer, stream: av.AudioStream) -> None:
    """One second of 440 Hz."""
    wave = np.sin(np.arange(16000) * 440 * 2 * np.pi / 16000).astype(np.float32) * 0.3
    frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
    frame.rate = 16000
    output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def write_manifest(path: Path, records: Iterable[dict]) -> Path:
    """A JSONL manifest."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def write_list(folder: Path, count: int = 6, frames: int = 12, **options: object) -> Path:
    """`count` clips, clip i showing 16 * i + its frame number, and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        name = f"clip{i}.mp4"
        write_clip(folder / name, range(16 * i, 16 * i + frames), **options)
        records.append({"path": name, "id": f"c{i}", "label": i, "split": "train"})
    return write_manifest(folder / "clips.jsonl", records)
