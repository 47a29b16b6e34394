"""Clip records and the manifests that list them.

A manifest says which clips exist and what is known about each. Four families are read into the
same `Clip` record:

* **jsonl**: our own, one JSON object a line. `path` is required; `id`, `start`, `end` (seconds),
  `captions` ({modality: text or list of texts}, or a text or list meaning modality `video`),
  `label` or `labels` ({name: text or int}), `qa` ([[question, answer], …] or
  [{question, answer}, …]), `split`, `group`, `audio` (whether there is sound), `sound` (a file of
  its own), `crop`, `options` and `answers` are optional. `path` may be missing where there are
  captions: text alone. Other keys are ignored, unless they look like a misspelling of one.
* **json**: a list of such objects; `file`, `topic`, `action` and `transcript` are understood too
  (`topic` and `action` become labels, `transcript` a `speech` caption).
* **annotations**: the released code's JSON lists of pictures, videos and sound with captions,
  options and questions (see `annotations`), also one object a line.
* the text lists of the released code (see `list_formats`).

Relative paths are looked up under `prefix` when it is given, else in the manifest's folder, else
in that folder's parent.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from iv2_jax.data import annotations, list_formats
from iv2_jax.data.records import Clip, FieldError, Problem, clip_from_object
from iv2_jax.errors import DataError, nearest

FORMATS = ("auto", "jsonl", "json", "annotations", *list_formats.FORMATS)

__all__ = ["FORMATS", "Clip", "Problem", "iter_clips", "read_clips", "select_split"]

_PROBED_PATHS = 16  # records looked at to decide which folder relative paths start from


def read_clips(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    prefix: str = "",
    split: str | None = None,
    separator: str | None = None,
) -> list[Clip]:
    """Reads a manifest of any known format.

    Args:
      path: the manifest file.
      format: one of `FORMATS`; `auto` decides by content where that is unambiguous.
      prefix: folder or URL that relative paths are joined to.
      split: keep only the clips of this split.
      separator: column separator of the text lists; None tries space, comma and tab.

    Returns:
      The clips in the manifest's order, at least one.

    Raises:
      DataError: the file cannot be read, its format cannot be told, a record is wrong (the message
        names file, line, field and what is allowed), or no clip is left.
    """
    clips: list[Clip] = []
    for item in iter_clips(path, format=format, prefix=prefix, separator=separator):
        if isinstance(item, Problem):
            raise DataError(
                f"{item.describe(path)} (`iv2 data validate {path}` lists every such problem)"
            )
        clips.append(item[1])
    if not clips:
        raise DataError(f"{path}: the list is empty; it needs at least one clip")
    return clips if split is None else select_split(clips, split, path)


def select_split(clips: list[Clip], split: str, name: str | os.PathLike[str]) -> list[Clip]:
    """The clips of one split; `DataError` with the known splits when there is none."""
    chosen = [clip for clip in clips if clip.split == split]
    if not chosen:
        known = sorted({clip.split for clip in clips if clip.split is not None})
        hint = nearest(split, known) if known else "; no record has a `split`: leave it out"
        raise DataError(f"{name}: no clip has split {split!r}{hint}")
    return chosen


def iter_clips(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    prefix: str = "",
    separator: str | None = None,
) -> Iterator[tuple[int, Clip] | Problem]:
    """Yields (line, clip) for every good record of a manifest and a `Problem` for every bad one.

    Raises:
      DataError: the file cannot be read or its format cannot be told.
    """
    if format not in FORMATS:
        raise DataError(f"unknown manifest format {format!r}{nearest(format, FORMATS)}")
    text = _read_text(path)
    if format == "auto":
        format = _detect(text, path)
    if format in ("jsonl", "json", "annotations"):
        in_lines = format == "jsonl" or (format == "annotations" and text.lstrip()[:1] == "{")
        objects = _json_lines(text) if in_lines else _json_list(text)
        parse = annotations.clip_from_annotation if format == "annotations" else clip_from_object
        records = (_parse_object(line, item, parse) for line, item in objects)
    else:
        records = (
            (line, item if isinstance(item, Exception) else _from_row(item))
            for line, item in list_formats.iter_rows(text, format, separator, path)
        )
    yield from _finish(records, Path(path), prefix)


def _read_text(path: str | os.PathLike[str]) -> str:
    """The manifest's text, or a `DataError` that names it."""
    if os.path.isdir(path):
        raise DataError(
            f"{path}: is a folder; a manifest is a file (a packed data set is read by "
            "`iv2_jax.data.sources.open_source`)"
        )
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: is not UTF-8 text (byte {e.start}); is it a manifest?") from e
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}") from e


def _detect(text: str, path: str | os.PathLike[str]) -> str:
    """Tells the format by the first record, else by the columns."""
    head = text.lstrip()[:1]
    if not head:
        raise DataError(f"{path}: the list is empty; it needs at least one clip")
    if head in "[{":
        objects = _json_list(text) if head == "[" else _json_lines(text)
        first = next((item for _, item in objects if not isinstance(item, Exception)), None)
        if annotations.looks_like(first):
            return "annotations"
        return "json" if head == "[" else "jsonl"
    return list_formats.detect(text, path)


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """(line, object or FieldError) of every line that is not blank."""
    for line, row in enumerate(text.split("\n"), start=1):  # texts may hold U+2028
        if not row.strip():
            continue
        try:
            yield line, json.loads(row)
        except json.JSONDecodeError as e:
            yield line, FieldError("", f"not JSON: {e.msg} at column {e.colno}")


def _json_list(text: str) -> Iterator[tuple[int, Any]]:
    """(line, object or FieldError) of every item of a JSON list; a syntax error ends it."""
    decoder = json.JSONDecoder()
    blank = re.compile(r"\s*")

    def skip(at: int) -> int:
        found = blank.match(text, at)
        return found.end() if found else at

    at = skip(0)
    if text[at : at + 1] != "[":
        yield 1, FieldError("", "must be a JSON list of objects")
        return
    line, counted = 1, 0
    at = skip(at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            item, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as e:
            yield e.lineno, FieldError("", f"not JSON: {e.msg} at column {e.colno}")
            return
        yield line, item
        at = skip(at)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
        elif text[at : at + 1] != "]":
            yield line, FieldError("", "not JSON: ',' or ']' is missing after this item")
            return
    at = skip(at + 1)
    if at != len(text):
        yield line, FieldError("", "not JSON: text after the end of the list")


def _parse_object(
    line: int, item: Any, parse: Callable[[Any], Clip]
) -> tuple[int, Clip | Exception]:
    """Turns one JSON object into a clip, or into the error that says what is wrong with it."""
    if isinstance(item, Exception):
        return line, item
    try:
        return line, parse(item)
    except FieldError as e:
        return line, e


def _from_row(row: list_formats.Row) -> Clip:
    """A line of a text list as a clip."""
    return Clip(
        id="",
        path=row.path,
        start=row.start,
        end=row.end,
        labels={} if row.label is None else {"label": row.label},
        frames=row.frames,
    )


def _finish(
    records: Iterator[tuple[int, Clip | Exception]], manifest: Path, prefix: str
) -> Iterator[tuple[int, Clip] | Problem]:
    """Resolves paths, fills in ids and refuses an id that is used twice."""
    resolve: Callable[[str], str] | None = None
    waiting: list[tuple[int, Clip | Exception]] = []
    seen: dict[str, int] = {}
    copies: collections.Counter[str] = collections.Counter()
    for record in records:
        if resolve is not None:
            yield _complete(record, resolve, seen, copies)
            continue
        waiting.append(record)
        if len(waiting) >= _PROBED_PATHS:
            resolve = _resolver(waiting, manifest, prefix)
            yield from (_complete(r, resolve, seen, copies) for r in waiting)
    if resolve is None:
        resolve = _resolver(waiting, manifest, prefix)
        yield from (_complete(r, resolve, seen, copies) for r in waiting)


def _complete(
    record: tuple[int, Clip | Exception],
    resolve: Callable[[str], str],
    seen: dict[str, int],
    copies: collections.Counter[str],
) -> tuple[int, Clip] | Problem:
    """One finished record."""
    line, clip = record
    if isinstance(clip, Exception):
        field, message = getattr(clip, "field", ""), getattr(clip, "message", str(clip))
        return Problem(line, field, message)
    name = clip.id
    if not name:
        name = clip.path or "text"
        if clip.start is not None or clip.end is not None:
            name += f"@{clip.start or 0.0:g}-{'' if clip.end is None else format(clip.end, 'g')}"
        base = name
        while name in seen:  # the same clip listed twice is allowed where nobody named it
            copies[base] += 1
            name = f"{base}#{copies[base] + 1}"
    elif name in seen:
        return Problem(line, "id", f"{name!r} is already used in line {seen[name]}")
    seen[name] = line
    sound = None if clip.sound is None else resolve(clip.sound)
    return line, dataclasses.replace(clip, id=name, path=resolve(clip.path), sound=sound)


def _resolver(
    records: list[tuple[int, Clip | Exception]], manifest: Path, prefix: str
) -> Callable[[str], str]:
    """Decides once where relative paths start from, so that a long list costs few file look-ups."""
    base = prefix
    if not base:
        paths = [clip.path for _, clip in records if isinstance(clip, Clip)]
        folder = manifest.parent
        candidates = (folder, folder.resolve().parent)
        found = (
            c for c in candidates if any((c / p).exists() for p in paths if p and "://" not in p)
        )
        base = str(next(found, folder))

    def resolve(path: str) -> str:
        if not path or "://" in path or os.path.isabs(path):
            return path
        return f"{base.rstrip('/')}/{path}" if "://" in base else os.path.join(base, path)

    return resolve
