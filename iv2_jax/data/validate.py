"""Checks a manifest before a run: every line, every file, every frame."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator

from iv2_jax.data import audio, manifest, sources
from iv2_jax.data.decode import DecodeError, VideoReader
from iv2_jax.data.manifest import Clip, Problem

_CHUNK = 32  # frames of a folder of pictures checked at a time


@dataclasses.dataclass(frozen=True)
class ClipFacts:
    """What is known of a clip that is good."""

    frames: int
    seconds: float
    height: int
    width: int
    codec: str
    audio: bool


@dataclasses.dataclass
class Report:
    """What a check found.

    Attributes:
      manifest: the file that was checked.
      good: facts about the clips that can be used.
      problems: what is wrong, by line.
      odd: oddities of clips that can be used nevertheless, by line.
      clips: the records that could be read.
    """

    manifest: str
    good: list[ClipFacts] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    odd: list[Problem] = dataclasses.field(default_factory=list)
    clips: list[Clip] = dataclasses.field(default_factory=list)


def check(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    prefix: str = "",
    separator: str | None = None,
    quick: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Checks a manifest and the clips it names.

    Args:
      path: the manifest.
      format: see `manifest.read_clips`.
      prefix: folder or URL that relative paths are joined to.
      separator: column separator of text lists.
      quick: look at the beginning of each file only, decode its first frame.
      threads: files checked at a time; the number of processors by default.
      progress: called with the number of clips once known, negated, then with 1 for each.

    Returns:
      The report; `problems` is empty when all is well.

    Raises:
      DataError: the manifest cannot be read or its format cannot be told.
    """
    report = Report(os.fspath(path))
    lines: list[tuple[int, Clip]] = []
    for item in manifest.iter_clips(path, format=format, prefix=prefix, separator=separator):
        if isinstance(item, Problem):
            report.problems.append(item)
        else:
            lines.append(item)
    report.clips = [clip for _, clip in lines]
    if not lines and not report.problems:
        report.problems.append(Problem(1, "", "the list is empty; it needs at least one clip"))
    tell = progress or (lambda n: None)
    tell(-len(lines))
    workers = threads or os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        checks = pool.map(lambda item: _check_clip(*item, quick=quick), lines)
        found = []
        for problem, facts, odd in checks:
            found.append(facts)
            if problem is not None:
                report.problems.append(problem)
            report.odd += odd
            tell(1)
    _sort_out(report, lines, found)
    report.problems.sort(key=lambda p: p.line)
    return report


def _sort_out(report: Report, lines: list[tuple[int, Clip]], found: list[ClipFacts | None]) -> None:
    """Keeps the facts of good clips; sound alone is not good in a list of pictures."""
    pictures = any(facts is not None and facts.height for facts in found)
    for (line, clip), facts in zip(lines, found, strict=True):
        if facts is not None and pictures and not facts.height:
            what = f"{clip.path}: has no video stream, only sound" if clip.path else "is text alone"
            message = f"{what}, unlike others here; put such records into a list of their own"
            report.problems.append(Problem(line, "path", message))
        elif facts is not None:
            report.good.append(facts)


def _check_clip(
    line: int, clip: Clip, *, quick: bool
) -> tuple[Problem | None, ClipFacts | None, list[Problem]]:
    """Opens and decodes one clip, and its sound."""
    odd: list[str] = []
    try:
        facts, field, warnings = _facts(clip, quick=quick)
        odd += warnings
    except DecodeError as e:
        return Problem(line, "path", str(e)), None, []
    if clip.sound is not None:
        try:
            _sound(clip.sound, None, None, odd)
        except DecodeError as e:
            return Problem(line, "sound", str(e)), None, []
    elif facts.audio and not quick and facts.height:
        try:
            _sound(clip.path, clip.start, clip.end, odd)
        except DecodeError as e:
            odd.append(f"its sound cannot be used: {e.reason}")
    problems = [Problem(line, "path", f"{clip.path}: {text}") for text in odd]
    if field and clip.audio is not None and clip.audio != facts.audio:
        said = "promises sound, there is none" if clip.audio else "promises silence, there is sound"
        problems.append(Problem(line, "audio", f"{clip.path}: the manifest {said}"))
    return None, facts, problems


def _facts(clip: Clip, *, quick: bool) -> tuple[ClipFacts, bool, list[str]]:
    """Facts about the clip's file, whether it may have sound, and oddities."""
    if not clip.path:
        return ClipFacts(0, 0.0, 0, 0, "text", False), False, []
    if clip.path.lower().endswith(sources.SOUND_FILES):
        warnings: list[str] = []
        seconds = _sound(clip.path, clip.start, clip.end, warnings)
        return ClipFacts(0, seconds, 0, 0, "sound", True), True, warnings
    frames = sources.open_frames(
        clip.path, start=clip.start, end=clip.end, frames=clip.frames, crop=clip.crop
    )
    try:
        facts = _decode(frames, quick=quick)
    finally:
        frames.close()
    return facts, isinstance(frames, VideoReader), list(frames.warnings)


def _sound(path: str, start: float | None, end: float | None, warnings: list[str]) -> float:
    """Seconds of a file's sound that decode."""
    source = sources.read_bytes(path) if "://" in path else path
    samples = audio.load_waveform(source, start=start, end=end, name=path, warnings=warnings)
    if samples is None:
        raise DecodeError(path, "has no sound stream")
    return len(samples) / audio.SAMPLE_RATE


def _decode(frames: sources.Frames, *, quick: bool) -> ClipFacts:
    """Decodes the first frame or all of them."""
    if not isinstance(frames, VideoReader):
        count = len(frames)
        for start in range(0, 1 if quick else count, _CHUNK):
            picture = frames.read(range(start, min(start + _CHUNK, count)))[0]
        return ClipFacts(count, 0.0, picture.shape[0], picture.shape[1], "pictures", False)
    picture = frames.read([0])[0]
    if not quick:
        decoded = sum(1 for _ in frames.walk())
        if decoded < len(frames):
            frames.warnings.append(f"{decoded} of {len(frames)} frames decode")
    seconds = len(frames) / frames.fps if frames.fps else 0.0
    height, width = picture.shape[:2]
    return ClipFacts(len(frames), seconds, height, width, frames.codec, frames.has_audio)


def summary(report: Report) -> Iterator[str]:
    """Lines that say what there is to train on."""
    good = report.good
    yield f"{len(good)} of {len(report.clips)} clips are good, {len(report.problems)} problems"
    if not good:
        return
    hours = sum(f.seconds for f in good) / 3600
    yield f"length: {hours:.2f} h, {sum(f.frames for f in good):,} frames"
    lengths = sorted(f.frames for f in good if f.frames)
    if lengths:
        yield f"frames a clip: {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}"
        sides = sorted(min(f.height, f.width) for f in good if f.frames)
        yield f"short side: {sides[0]} to {sides[-1]} pixels, median {sides[len(sides) // 2]}"
    yield f"codecs: {_counts(f.codec for f in good)}"
    clips = report.clips
    files = sum(clip.sound is not None for clip in clips)
    yield f"with sound: {sum(f.audio for f in good)}" + (f", in files apart: {files}" * bool(files))
    yield f"splits: {_counts(c.split or 'none' for c in clips)}"
    captions = collections.Counter(m for c in clips for m, t in c.captions.items() for _ in t)
    yield f"captions: {_counts(captions)}"
    names = collections.defaultdict(set)
    for clip in clips:
        for name, label in clip.labels.items():
            names[name].add(label)
    yield "labels: " + (", ".join(f"{n} ({len(v)} values)" for n, v in names.items()) or "none")
    yield f"question and answer pairs: {sum(len(c.qa) for c in clips)}"


def _counts(values: Iterator[str] | collections.Counter[str]) -> str:
    """`a 3, b 1`, the most frequent first."""
    counted = values if isinstance(values, collections.Counter) else collections.Counter(values)
    return ", ".join(f"{name} {count}" for name, count in counted.most_common()) or "none"
