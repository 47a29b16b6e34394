"""Which packets a video stream consists of, found by reading the file without decoding it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import av
import av.error
import numpy as np

# What reading packets raises; IndexError is PyAV's, where damage lets streams appear or vanish.
READ_ERRORS = (av.error.FFmpegError, OSError, IndexError)
HELD_BYTES = 64 << 20  # packets up to this size stay in memory between listing and decoding
_RANDOM_ACCESS_FORMATS = ("mp4", "matroska")
_RANDOM_ACCESS_CODECS = ("h264", "hevc", "av1", "libdav1d")
_SEEK_SECONDS = 5.0  # a stretch that starts later than this is sought, not read up to


@dataclasses.dataclass(frozen=True)
class PacketTable:
    """The packets of one stream, or of a stretch of it, in decoding order.

    Attributes:
      pts: (p,) timestamps in units of the stream, -1 where a packet has none.
      keys: places of the keyframes.
      order: (n,) place of the i-th frame to be shown within the stretch.
      times: (n,) seconds from the beginning of the file at which it is shown.
      first: how many frames before the stretch the packets give when decoded from the first.
      exact: whether every packet has a timestamp of its own.
      sought: whether the first packet is a keyframe in the middle of the file.
      packets: the packets, or nothing when they are too large to hold.
    """

    pts: np.ndarray
    keys: np.ndarray
    order: np.ndarray
    times: np.ndarray
    first: int
    exact: bool
    sought: bool
    packets: tuple[av.Packet, ...]

    def keyframe_before(self, place: int) -> int:
        """Where decoding must start so that the packet at `place` comes out whole.

        A keyframe stored before the packet but shown after it (open group of pictures) does not
        serve.
        """
        for key in self.keys[: np.searchsorted(self.keys, place, "right")][::-1].tolist():
            if self.pts[key] <= self.pts[place]:
                return key
        return 0


def trusted(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether frames of this format may be found by timestamp (spec realdata 5, rule 1)."""
    names = container.format.name.split(",")
    return stream.codec_context.name in _RANDOM_ACCESS_CODECS and any(
        name in names for name in _RANDOM_ACCESS_FORMATS
    )


def worth_seeking(
    container: av.container.InputContainer, stream: av.VideoStream, start: float | None
) -> bool:
    """Whether a stretch starts so late that the file is better entered at its start."""
    return start is not None and start > _SEEK_SECONDS and trusted(container, stream)


def scan(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    start: float | None,
    end: float | None,
    *,
    sought: bool,
) -> tuple[PacketTable | None, str]:
    """Lists the packets of a stretch.

    Args:
      container: the file, just opened.
      stream: the video stream.
      start: first second of the stretch or None.
      end: its last second (not included) or None.
      sought: begin at the keyframe before `start` instead of at the first packet.

    Returns:
      The table, and what went wrong while reading, if anything. The table is None when there is no
      packet, or the keyframe is not where the timestamps say.
    """
    unit = float(stream.time_base or 0) or 1.0
    origin = stream.start_time
    if sought:
        if origin is None or start is None:
            return None, ""
        container.seek(origin + int(start / unit), stream=stream, backward=True)
    stop = None if end is None or origin is None else origin + end / unit
    found, held, problem = _collect(container, stream, stop)
    pts = np.array([-1 if f[0] is None else f[0] for f in found], np.int64)
    shown = np.flatnonzero([not f[2] for f in found])
    if not len(shown):
        return None, problem
    exact = all(f[0] is not None for f in found) and len(np.unique(pts)) == len(pts)
    if exact:
        order = shown[np.argsort(pts[shown], kind="stable")]
        times = (pts[order] - (pts[order[0]] if origin is None else origin)) * unit
    else:
        order = shown
        times = np.arange(len(shown)) / float(stream.average_rate or 25)
    if sought and (not exact or not found[0][1] or times[0] > (start or 0.0)):
        return None, problem
    first, last = stretch(times, start, end)
    keys = np.flatnonzero([f[1] for f in found])
    span = slice(first, last)
    return PacketTable(pts, keys, order[span], times[span], first, exact, sought, held), problem


def _collect(
    container: av.container.InputContainer, stream: av.VideoStream, stop: float | None
) -> tuple[list[tuple[int | None, bool, bool]], tuple[av.Packet, ...], str]:
    """(pts, key, discarded) of every packet up to the time `stop`, the packets, and any error."""
    found: list[tuple[int | None, bool, bool]] = []
    held: list[av.Packet] | None = []
    size = 0
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if stop is not None and packet.dts is not None and packet.dts >= stop:
                break  # later packets are shown later still
            found.append((packet.pts, packet.is_keyframe, packet.is_discard))
            size += packet.size
            if held is not None and size <= HELD_BYTES:
                held.append(packet)
            else:
                held = None
    except READ_ERRORS as e:
        return found, tuple(held or ()), f"cannot be read to its end: {reason(e)}"
    return found, tuple(held or ()), ""


def stretch(times: np.ndarray, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last (not included) frame on screen between two times.

    Args:
      times: (n,) ascending seconds.
      start: seconds; the frame on screen then may have appeared a little earlier.
      end: seconds, not included.

    Returns:
      Two indices; equal when nothing is on screen.
    """
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    tolerance = min(0.5 * step, 1e-3)  # times that were rounded to milliseconds
    first, last = 0, len(times)
    if start is not None:
        if start >= times[-1] + max(step, tolerance):
            return last, last
        first = max(int(np.searchsorted(times, start + tolerance, "right")) - 1, 0)
    if end is not None:
        last = max(int(np.searchsorted(times, end - tolerance, "left")), first + 1)
    return first, last


def packets_from(
    container: av.container.InputContainer, stream: av.VideoStream, table: PacketTable, place: int
) -> Iterator[av.Packet | None]:
    """Yields the packets of the table from `place` on, then None for the end.

    Packets that are not held are read again. For the first packet of a file it must just have been
    opened, as not every format can be wound back; otherwise the file is sought, and the iterator
    ends at once when the packet is not found where it was.
    """
    if table.packets:
        yield from table.packets[place:]
        yield None
        return
    left = len(table.pts) - place
    sync = place > 0 or table.sought
    if sync:
        container.seek(int(table.pts[place]), stream=stream, backward=True)
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if sync and packet.pts != table.pts[place]:
            if packet.pts is not None and packet.pts > table.pts[place] and packet.is_keyframe:
                return
            continue
        sync = False
        left -= 1
        yield packet
        if not left:
            break
    if not sync:
        yield None


def reason(error: Exception) -> str:
    """FFmpeg's words, without the errno and the path."""
    return getattr(error, "strerror", None) or str(error)
