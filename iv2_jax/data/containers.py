"""Opening the files of videos and sounds, and what is said of those that cannot be used."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator

import av
import av.error

from iv2_jax.data import packets
from iv2_jax.errors import UserError


class DecodeError(UserError, ValueError):
    """A video that cannot be used: missing, empty, corrupt, without pictures, too short."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@contextlib.contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Gives errors of reading and decoding the name of the file."""
    try:
        yield
    except packets.READ_ERRORS as e:
        raise DecodeError(name, f"cannot be decoded: {packets.reason(e)}") from e


def open_container(
    source: str | os.PathLike[str] | bytes, name: str
) -> av.container.InputContainer:
    """Opens a file, given by its path or its bytes, at its beginning.

    Raises:
      DecodeError: it is missing, empty, a folder, or of no format that FFmpeg knows.
    """
    source = source if isinstance(source, bytes) else os.fspath(source)
    if _size_of(source, name) == 0:
        raise DecodeError(name, "is empty (zero bytes)")
    try:
        given = io.BytesIO(source) if isinstance(source, bytes) else source
        return av.open(given, metadata_errors="ignore")
    except (av.error.FFmpegError, OSError, ValueError) as e:
        raise DecodeError(name, f"cannot be opened: {packets.reason(e)}") from e


def largest_picture(container: av.container.InputContainer) -> av.VideoStream | None:
    """The decodable video stream with the largest picture; cover art does not count."""
    attached = av.stream.Disposition.attached_pic
    streams = [
        s
        for s in container.streams.video
        if s.codec_context is not None and not s.disposition & attached
    ]
    return max(streams, key=lambda s: (s.width * s.height, -s.index), default=None)


def pick_stream(container: av.container.InputContainer, name: str) -> av.VideoStream:
    """The stream of `largest_picture`, and no other read any more."""
    best = largest_picture(container)
    if best is None:
        kinds = {s.type for s in container.streams if s.type and s.type != "video"}
        other = ", ".join(sorted(kinds)) or "nothing else"
        raise DecodeError(name, f"has no video stream (it has: {other})")
    for stream in container.streams:
        if stream.index != best.index:
            stream.discard = av.stream.Discard.all
    return best


def _size_of(source: str | bytes, name: str) -> int:
    """Size in bytes, or a `DecodeError` that says why there is none."""
    if isinstance(source, bytes):
        return len(source)
    if os.path.isdir(source):
        raise DecodeError(name, "is a folder, not a file")
    try:
        return os.stat(source).st_size
    except FileNotFoundError as e:
        raise DecodeError(name, "does not exist") from e
    except OSError as e:
        raise DecodeError(name, f"cannot be read: {e.strerror}") from e
