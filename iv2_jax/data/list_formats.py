"""The plain-text lists of the released code (spec stage1 7.1), one clip a line, no header.

| format | columns |
|---|---|
| `pretrain` | source path total start end target; times in seconds, -1 = whole video |
| `kinetics` | path label (Kinetics, MiT, UCF101, ANet, HACS, and SSv2 / HMDB51 as videos) |
| `frames` | folder n_frames label (SSv2 and HMDB51 as folders of frames) |
| `interval` | path total_time start end label (ANet and HACS with intervals) |

Labels are whole numbers. `source` and `target` of `pretrain` are checked and otherwise unused,
as in the original, except that `target` is kept as the label.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Callable, Iterator

from iv2_jax.data.records import FieldError
from iv2_jax.errors import DataError

FORMATS = ("pretrain", "kinetics", "frames", "interval")
SEPARATORS = (" ", ",", "\t")
_NAMES = {" ": "space", ",": "comma", "\t": "tab"}
_PROBED_LINES = 50  # lines that must all fit before a format is believed


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a list; times in seconds, None for the beginning and the end of the file."""

    path: str
    label: int | None = None
    start: float | None = None
    end: float | None = None
    frames: int | None = None


@dataclasses.dataclass(frozen=True)
class _Format:
    """Names of the columns and how they make a row."""

    columns: tuple[str, ...]
    build: Callable[[dict[str, str]], Row]


def _whole(columns: dict[str, str], name: str, lowest: int | None = None) -> int:
    """A whole number."""
    try:
        value = int(columns[name])
    except ValueError:
        raise FieldError(name, f"must be a whole number, is {columns[name]!r}") from None
    if lowest is not None and value < lowest:
        raise FieldError(name, f"must be at least {lowest}, is {value}")
    return value


def _time(columns: dict[str, str], name: str) -> float:
    """Seconds; -1 means that nothing is said."""
    try:
        value = float(columns[name])
    except ValueError:
        raise FieldError(name, f"must be a number of seconds, is {columns[name]!r}") from None
    if not (0 <= value < 1e9 or value == -1):
        raise FieldError(name, f"must be a number of seconds from 0 on, or -1, is {value}")
    return value


def _path(columns: dict[str, str], name: str = "path") -> str:
    """A path that is not blank."""
    path = columns[name].strip()
    if not path:
        raise FieldError(name, "is empty")
    return path


def _interval(columns: dict[str, str]) -> tuple[float | None, float | None]:
    """Start and end, None where the whole video is meant."""
    start, end = _time(columns, "start"), _time(columns, "end")
    if start == -1 or end == -1:
        if start != end:
            raise FieldError("start", f"start and end are -1 together or not, are {start}, {end}")
        return None, None
    if end <= start:
        raise FieldError("end", f"must be later than start ({start} s), is {end} s")
    return start, end


def _pretrain(columns: dict[str, str]) -> Row:
    """source path total start end target."""
    _time(columns, "total")
    start, end = _interval(columns)
    return Row(_path(columns), _whole(columns, "target"), start, end)


def _kinetics(columns: dict[str, str]) -> Row:
    """Path label."""
    return Row(_path(columns), _whole(columns, "label"))


def _frames(columns: dict[str, str]) -> Row:
    """Folder n_frames label."""
    label, frames = _whole(columns, "label"), _whole(columns, "n_frames", 1)
    return Row(_path(columns, "folder"), label, frames=frames)


def _timed(columns: dict[str, str]) -> Row:
    """Path total start end label."""
    _time(columns, "total")
    start, end = _interval(columns)
    return Row(_path(columns), _whole(columns, "label"), start, end)


_FORMATS = {
    "pretrain": _Format(("source", "path", "total", "start", "end", "target"), _pretrain),
    "kinetics": _Format(("path", "label"), _kinetics),
    "frames": _Format(("folder", "n_frames", "label"), _frames),
    "interval": _Format(("path", "total", "start", "end", "label"), _timed),
}


def iter_rows(
    text: str, format: str, separator: str | None, name: str | os.PathLike[str]
) -> Iterator[tuple[int, Row | FieldError]]:
    """Yields (line, row), or (line, error) for a line that cannot be used.

    Args:
      text: the list.
      format: one of `FORMATS`.
      separator: column separator; None takes the one that fits the first line.
      name: the list's name, for messages.

    Raises:
      DataError: no separator fits the first line.
    """
    if separator is None:
        separator = _fitting_separator(text, format, name)
    for line, columns in _split(text, separator):
        yield line, _row(columns, format, separator)


def detect(text: str, name: str | os.PathLike[str]) -> str:
    """Tells the format by the columns of the first lines.

    Raises:
      DataError: none fits, or more than one does.
    """
    fitting = sorted({f for f in FORMATS for s in SEPARATORS if _fits(text, f, s)})
    if len(fitting) == 1:
        return fitting[0]
    found = f"fits {' and '.join(fitting)}" if fitting else "fits no known list format"
    first = text.strip().splitlines()[0][:80]
    known = ", ".join(("jsonl", "json", "annotations", *FORMATS))
    raise DataError(
        f"{name}: cannot tell the format: {first!r} {found}; pass format= one of {known} and, if "
        "it is not space, comma or tab, the separator"
    )


def _split(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line, columns) of the lines that are not blank, quotes honoured."""
    for line, row in enumerate(text.splitlines(), start=1):
        if not row.strip():
            continue
        try:
            yield line, next(csv.reader([row], delimiter=separator))
        except csv.Error:  # not a table at all: one column, which no format has
            yield line, [row]


def _row(columns: list[str], format: str, separator: str) -> Row | FieldError:
    """One line's row or what is wrong with it."""
    spec = _FORMATS[format]
    if len(columns) != len(spec.columns):
        shown = _NAMES.get(separator, repr(separator))
        return FieldError(
            "",
            f"has {len(columns)} columns split at {shown}, format {format!r} has "
            f"{len(spec.columns)}: {' '.join(spec.columns)}",
        )
    try:
        return spec.build(dict(zip(spec.columns, columns, strict=True)))
    except FieldError as e:
        return e


def _fits(text: str, format: str, separator: str) -> bool:
    """Whether the first lines all parse."""
    lines = 0
    for _, columns in _split(text, separator):
        if isinstance(_row(columns, format, separator), FieldError):
            return False
        lines += 1
        if lines == _PROBED_LINES:
            break
    return lines > 0


def _fitting_separator(text: str, format: str, name: str | os.PathLike[str]) -> str:
    """The separator that gives the first line the right number of columns."""
    first = next(iter(text.strip().splitlines()), "")
    if not first:
        return SEPARATORS[0]
    columns = _FORMATS[format].columns
    fitting = [s for s in SEPARATORS if len(next(_split(first, s))[1]) == len(columns)]
    if len(fitting) > 1:  # a path with spaces in a comma-separated list, say
        fitting = [s for s in fitting if _fits(first, format, s)]
    if len(fitting) != 1:
        raise DataError(
            f"{name}: line 1: format {format!r} has {len(columns)} columns ({' '.join(columns)}); "
            f"{first[:80]!r} does not split into them at space, comma or tab alone: pass separator="
        )
    return fitting[0]
