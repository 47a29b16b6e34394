"""Clips of natural footage, cut out of the videos that installed packages carry.

The packages are looked up as files and never imported; `footage.py` says what is where.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from iv2_jax.data.decode import VideoReader
from iv2_jax.data.records import Clip
from iv2_jax.demo.encode import AUDIO_RATE, Sound, write_clip
from iv2_jax.demo.footage import SEGMENTS, Segment

SHORT_SIDE = 160  # pixels; larger pictures are scaled down to it, as small as the game clips


@dataclasses.dataclass(frozen=True)
class NaturalClips:
    """What was found.

    Attributes:
        clips: the written clips.
        missing: `package: file` of each video that is not there.
    """

    clips: tuple[Clip, ...]
    missing: tuple[str, ...]


def cut_clips(folder: Path, segments: Sequence[Segment] = SEGMENTS) -> NaturalClips:
    """Cuts the segments out of the installed videos.

    Args:
        folder: where the files go; paths of the clips are relative to its parent.
        segments: what to cut.

    Returns:
        The clips, in the order of `segments`, and what is missing.

    Raises:
        DecodeError: a video is there but cannot be decoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {s.source: s.source.find() for s in segments}
    clips = [
        _cut(segment, path, folder)
        for segment in segments
        if (path := found[segment.source]) is not None
    ]
    missing = [f"{s.package}: {s.file}" for s, path in found.items() if path is None]
    return NaturalClips(tuple(clips), tuple(missing))


def _cut(segment: Segment, path: Path, folder: Path) -> Clip:
    """Writes one segment and describes it."""
    with VideoReader(path, start=segment.start, end=segment.end) as reader:
        frames = reader.read(range(len(reader)))
        fps = Fraction(reader.fps).limit_denominator(1001)
    sound = _read_sound(path, segment.start, segment.end)
    write_clip(
        folder / f"{segment.id}.mp4", frames, fps=fps, size=_stored(*frames.shape[1:3]), sound=sound
    )
    return Clip(
        id=segment.id,
        path=f"{folder.name}/{segment.id}.mp4",
        captions={"video": segment.captions},
        labels={"topic": segment.source.topic},
        qa=segment.qa,
        split=segment.split,
        group=segment.group,
        audio=sound is not None,
    )


def _stored(height: int, width: int) -> tuple[int, int]:
    """Height and width with the short side at most `SHORT_SIDE`, both even."""
    scale = min(1.0, SHORT_SIDE / min(height, width))
    return round(height * scale / 2) * 2, round(width * scale / 2) * 2


def _read_sound(path: Path, start: float, end: float) -> Sound | None:
    """The sound between two seconds, mixed down to one channel; None without a sound stream."""
    with av.open(os.fspath(path)) as container:
        if not container.streams.audio:
            return None
        resampler = av.AudioResampler(format="s16", layout="mono", rate=AUDIO_RATE)
        pieces = [
            piece.to_ndarray()[0]
            for frame in container.decode(container.streams.audio[0])
            for piece in resampler.resample(frame)
        ]
        pieces += [piece.to_ndarray()[0] for piece in resampler.resample(None)]
    samples = np.concatenate(pieces)
    return Sound(samples[round(start * AUDIO_RATE) : round(end * AUDIO_RATE)], AUDIO_RATE)
