"""Reads the sound of one stretch of an open file; `audio` is the way in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import av
import av.error
import numpy as np

from iv2_jax.data import fbank, packets, pcm
from iv2_jax.data.containers import DecodeError, largest_picture
from iv2_jax.data.fbank import SAMPLE_RATE

_SEEK_EARLY = 1.0  # seconds before a stretch, for decoders that need a run-up
_EXACT_FORMATS = ("mp4", "matroska", "wav", "flac")  # whose timestamps hold after a jump
_MARGIN = 0.1  # seconds around the stretch that the resampling filter may look at
_JITTER = 0.05  # seconds a timestamp may be off before the sound is moved to it
_LONGEST_GAP = 600.0  # seconds; a larger jump is an error of the timestamps, not silence
_LONGEST_STEP_BACK = 1.0  # seconds; the same for a jump back
_JUMP = "the timestamps of its sound jump; it is taken to go on without a gap"


@dataclasses.dataclass
class _Run:
    """Sound without a gap: (n,) blocks of one channel at `rate`, from `time` seconds on."""

    time: float
    rate: int
    blocks: list[np.ndarray]
    count: int = 0

    @property
    def end(self) -> float:
        """Second at which it ends."""
        return self.time + self.count / self.rate

    def add(self, block: np.ndarray) -> None:
        """Appends a block."""
        self.blocks.append(block)
        self.count += len(block)

    def resampled(self) -> np.ndarray:
        """(m,) float32 at 16 kHz."""
        return pcm.resample(np.concatenate(self.blocks), self.rate)


class SoundReader:
    """Decodes one stretch of an open file."""

    def __init__(
        self,
        container: av.container.InputContainer,
        stream: av.AudioStream,
        name: str,
        start: float | None,
        end: float | None,
        notes: list[str],
    ) -> None:
        """Takes the file, just opened, and a list for what is odd about it."""
        self._container, self._stream, self._name = container, stream, name
        self._start, self._end, self._notes = start, end, notes
        self._unit = float(stream.time_base or 0) or 1 / (stream.sample_rate or SAMPLE_RATE)
        self._has_pictures = largest_picture(container) is not None
        self._origin = _origin(container, stream)
        self._good = self._bad = 0
        self._why = ""
        for other in container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all

    def read(self, *, seek: bool) -> np.ndarray | None:
        """The samples; None when the file was sought and the place was not found."""
        if seek and not self._seek():
            return None
        runs = self._runs(sought=seek)
        if runs is None:
            return None
        self._judge()
        return self._laid_out(runs)

    def _seek(self) -> bool:
        """Jumps to a little before the start, where the format allows it."""
        if self._origin is None or not can_be_entered(self._container):
            return False
        at = self._origin + (self._start or 0.0) - _SEEK_EARLY
        try:
            self._container.seek(int(at / self._unit), stream=self._stream, backward=True)
        except av.error.FFmpegError:
            return False
        return True

    def _frames(self) -> Iterator[av.AudioFrame]:
        """Every frame that decodes; what does not is counted."""
        feed = self._container.demux(self._stream)
        while True:
            try:
                packet = next(feed)
            except StopIteration:
                return
            except packets.READ_ERRORS as e:
                self._notes.append(f"its sound cannot be read to its end: {packets.reason(e)}")
                packet = None
            try:
                frames = self._stream.codec_context.decode(packet)
                self._good += bool(frames)
            except av.error.FFmpegError as e:
                frames = []
                if packet is not None and packet.size:
                    self._bad += 1
                    self._why = packets.reason(e)
            yield from frames
            if packet is None:
                return

    def _timed(self) -> Iterator[tuple[float | None, av.AudioFrame]]:
        """Frames up to the end of the stretch, with the second at which they begin."""
        for frame in self._frames():
            if not frame.samples:
                continue
            time = None
            if frame.pts is not None:
                at = float(frame.pts * (frame.time_base or self._unit))
                if self._origin is None:
                    self._origin = at
                time = at - self._origin
                if self._end is not None and time > self._end + _MARGIN:
                    return
            yield time, frame

    def _runs(self, *, sought: bool) -> list[_Run] | None:
        """The sound of the stretch as runs; None when a sought file begins too late."""
        runs: list[_Run] = []
        now: float | None = None  # where the sound goes on
        exact = False  # a run's first timestamp is taken as it is
        for time, frame in self._timed():
            if now is None:
                if sought and (time is None or time > (self._start or 0.0) - _MARGIN):
                    return None
                now = time if sought else 0.0
                exact = True
            if time is None or not -_LONGEST_STEP_BACK < time - now < _LONGEST_GAP:
                if time is not None and _JUMP not in self._notes:
                    self._notes.append(_JUMP)
                time = now
            elif not exact and abs(time - now) <= _JITTER:
                time = now
            exact = False
            now = time + frame.samples / frame.sample_rate
            if self._start is not None and now < self._start - _MARGIN:
                continue
            if not runs or runs[-1].rate != frame.sample_rate or runs[-1].end != time:
                runs.append(_Run(time, frame.sample_rate, []))
            runs[-1].add(pcm.to_mono(frame, self._name))
            now = runs[-1].end
        return None if sought and now is None else runs

    def _judge(self) -> None:
        """Whether enough of the stream decodes."""
        if self._bad > self._good:
            raise DecodeError(
                self._name,
                f"its sound is corrupt: {self._bad} of {self._bad + self._good} packets do not "
                f"decode ({self._why})",
            )
        if self._bad:
            self._notes.append(f"{self._bad} packets of its sound do not decode ({self._why})")

    def _laid_out(self, runs: list[_Run]) -> np.ndarray:
        """The runs in their places, cut to the stretch."""
        start = self._start or 0.0
        end = max((run.end for run in runs), default=0.0)
        self._check_length(end)
        if self._end is not None:
            end = min(end, self._end)
        count = round((end - start) * SAMPLE_RATE)
        out = np.zeros(max(count, 0), np.float32)
        found = False
        for run in runs:
            at = round((run.time - start) * SAMPLE_RATE)
            if at < len(out) and run.end > start:
                part = run.resampled()[max(-at, 0) :][: len(out) - max(at, 0)]
                out[max(at, 0) : max(at, 0) + len(part)] = part
                found = found or len(part) > 0
        if not found:
            raise DecodeError(self._name, self._emptiness())
        return np.clip(out, -1.0, 1.0, out=out)

    def _emptiness(self) -> str:
        """Why there is nothing."""
        damage = f" ({'; '.join(self._notes)})" if self._notes else ""
        if self._start is None and self._end is None:
            return f"its sound stream has no samples{damage}"
        until = "its end" if self._end is None else f"{self._end} s"
        return f"has no sound from {self._start or 0.0} s to {until}{damage}"

    def _check_length(self, end: float) -> None:
        """Notes when the file holds less than it promises."""
        if self._stream.duration is None:
            return
        promised = self._stream.duration * self._unit
        offset = (self._stream.start_time or 0) * self._unit - (self._origin or 0.0)
        wanted = promised + offset if self._end is None else min(promised + offset, self._end)
        if end < wanted - max(0.5, 0.02 * promised):
            self._notes.append(f"is cut off: its sound ends at {end:.1f} of {wanted:.1f} s")


class ReleasedReader(SoundReader):
    """The released loaders' ways."""

    def read(self, *, seek: bool) -> np.ndarray | None:
        """The samples, in the range that the decoder gives them."""
        if seek:
            return None  # its cuts are at packets, decoded from the first
        blocks, rate, channels = [], SAMPLE_RATE, 0
        for time, frame in self._timed():
            if time is not None and self._start is not None and time < self._start:
                continue
            planes = (pcm.stored_array if self._has_pictures else pcm.to_planes)(frame, self._name)
            rate, channels = frame.sample_rate, len(planes)
            mono = planes.mean(axis=0) if len(planes) == 2 else planes[0]
            blocks.append(mono.astype(np.float32))
        if not blocks:
            raise DecodeError(self._name, self._emptiness())
        out = pcm.resample(np.concatenate(blocks), rate)
        return out if self._has_pictures or channels == 2 else out[: fbank.CLIP_SAMPLES]


def can_be_entered(container: av.container.InputContainer) -> bool:
    """Whether the timestamps of this format hold after a jump into its middle."""
    return any(name in _EXACT_FORMATS for name in container.format.name.split(","))


def _origin(container: av.container.InputContainer, stream: av.AudioStream) -> float | None:
    """Second 0 of the pictures, or else of the sound, on the file's clock; None if not stored."""
    for source in (largest_picture(container), stream):
        if source is not None and source.start_time is not None and source.time_base:
            return float(source.start_time * source.time_base)
    return None
