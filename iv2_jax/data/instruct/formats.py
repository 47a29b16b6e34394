"""Files of conversations in the formats they come in, read and written.

* `videochat`, of VideoChat2-IT: a JSON list of `{"video" or "image": path, "QA": [{"i", "q",
  "a"}], "start", "end"}`; text alone has `QA` only;
* `llava`: a JSON list of `{"id", "video" or "image": path or paths, "conversations": [{"from",
  "value"}]}`, see `llava`;
* `ours`: one JSON object a line, a manifest's record with `qa`; see `ours`.

Ours says everything that the others do; what a format cannot say is refused, never dropped.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iv2_jax.data import manifest
from iv2_jax.data.instruct import llava, ours, videochat
from iv2_jax.data.instruct.conversations import Conversation, check, joined
from iv2_jax.data.records import FieldError, misspelt, show
from iv2_jax.errors import ConfigError, DataError, nearest

_MODULES = {"videochat": videochat, "llava": llava, "ours": ours}
FORMATS = tuple(_MODULES)
MISSING = ("error", "skip", "ignore")
_PROBED = 16  # records looked at to decide which folder relative paths start from


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with a record of a file.

    Attributes:
      path: the file.
      record: its number in the file, from 1 on.
      line: where it begins.
      field: the field, empty where the whole record is meant.
      message: what is wrong and what is allowed.
    """

    path: str
    record: int
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        field = f" {self.field}:" if self.field else ""
        return f"{self.path}:{self.line}: record {self.record}:{field} {self.message}"


def detect(item: Any) -> str | None:
    """The format that a record is written in, None where nothing tells."""
    if not isinstance(item, dict):
        return None
    if "qa" in item:
        pair = next(iter(item["qa"]), None) if isinstance(item["qa"], list) else None
        return "videochat" if isinstance(pair, dict) and {"q", "a"} & set(pair) else "ours"
    if any(key.lower() == "qa" for key in item):
        return "videochat"
    if any(misspelt(key.lower(), ("conversations",)) or key == "conversations" for key in item):
        return "llava"
    return None


def from_record(item: Any, format: str) -> Conversation:
    """Reads one record; paths stay as they are written.

    Raises:
      FieldError: a field is missing, misspelt or wrong; the message says what is allowed.
    """
    if not isinstance(item, dict):
        raise FieldError("", f"must be a JSON object, is {show(item)}")
    return check(_MODULES[format].from_record(item))


def to_record(conversation: Conversation, format: str) -> dict[str, Any]:
    """Writes one record.

    Raises:
      FieldError: the format cannot say it, or the conversation is not complete.
    """
    return _MODULES[format].to_record(check(conversation))


def iter_conversations(
    path: str | os.PathLike[str], *, format: str = "auto"
) -> Iterator[tuple[int, int, Conversation] | Problem]:
    """Yields (record, line, conversation) or a `Problem` for every record; paths as written.

    Raises:
      ConfigError: the format is not known.
      DataError: the file cannot be read, or its format cannot be told.
    """
    if format not in ("auto", *FORMATS):
        raise ConfigError(f"format {format!r} is not known{nearest(format, ('auto', *FORMATS))}")
    text = manifest._read_text(path)
    if not text.strip():
        raise DataError(f"{path}: is empty; it needs at least one conversation")
    read_items = manifest._json_list if text.lstrip()[0] == "[" else manifest._json_lines
    for record, (line, item) in enumerate(read_items(text), start=1):
        if format == "auto" and not isinstance(item, Exception):
            found = detect(item)
            if found is None:
                raise DataError(
                    f"{path}:{line}: record {record}: has neither QA (videochat), conversations "
                    f"(llava) nor qa (ours), so the format cannot be told: {show(item)}"
                )
            format = found
        try:
            if isinstance(item, Exception):
                raise item
            yield record, line, from_record(item, format)
        except FieldError as e:
            yield Problem(os.fspath(path), record, line, e.field, e.message)


def read(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",
    root: str | None = None,
    missing: str = "error",
    problems: list[Problem] | None = None,
) -> list[Conversation]:
    """Reads a file of conversations.

    Args:
      path: the file.
      format: one of `FORMATS`, or `auto`, told by the first record.
      root: folder or URL that relative paths start from; None: the file's folder, or that one's
        parent if nothing is there.
      missing: files that are not there are an `error`, make their conversations be left out
        (`skip`), or are not looked for (`ignore`). URLs never are.
      problems: takes what is wrong with records, which are then left out; None: the first one is
        an error.

    Returns:
      The conversations in the file's order, at least one, with whole paths and ids.

    Raises:
      ConfigError: an argument is not known.
      DataError: the file or a record cannot be used; the message names file, line, record, field
        and what is allowed.
    """
    if missing not in MISSING:
        raise ConfigError(f"missing {missing!r} is not known{nearest(missing, MISSING)}")
    kept: list[Conversation] = []
    lost: list[Problem] = []
    there: dict[str, bool] = {}
    found: list[tuple[int, int, Conversation]] = []
    for item in iter_conversations(path, format=format):
        if not isinstance(item, Problem):
            found.append(item)
        elif problems is None:
            raise DataError(str(item))
        else:
            problems.append(item)
    if root is None:
        root = _root(Path(path), [medium.path for _, _, c in found[:_PROBED] for medium in c.media])
    for record, line, conversation in found:
        media = tuple(
            dataclasses.replace(medium, path=joined(root, medium.path))
            for medium in conversation.media
        )
        name = conversation.id or f"{os.path.basename(path)}:{line}"
        gone = [m for m in media if missing != "ignore" and not _exists(m.path, there)]
        if gone:
            message = f"{gone[0].path} does not exist"
            lost.append(Problem(os.fspath(path), record, line, gone[0].kind, message))
            continue
        kept.append(dataclasses.replace(conversation, media=media, id=name))
    if lost and missing == "error" and problems is None:
        count = sum(not is_there for is_there in there.values())
        raise DataError(
            f"{lost[0]} ({count} of {len(there)} files are missing; relative paths start from "
            f"{root!r}: set the root, or skip such records)"
        )
    if problems is not None:
        problems += lost
    elif lost and missing == "skip":
        print(
            f"iv2: {path}: {len(lost)} conversations left out: their files are missing, such as "
            f"{lost[0].message}",
            file=sys.stderr,
            flush=True,
        )
    if not kept:
        why = f"; the first problem: {(problems or lost)[0]}" if problems or lost else ""
        raise DataError(f"{path}: no conversation can be used{why}")
    return kept


def _root(file: Path, paths: Sequence[str]) -> str:
    """Where relative paths start from, by what is there."""
    for folder in (file.parent, file.resolve().parent.parent):
        if any((folder / path).exists() for path in paths if path and "://" not in path):
            return str(folder)
    return str(file.parent)


def _exists(path: str, known: dict[str, bool]) -> bool:
    """Whether a file or folder is there, looked up once each; URLs are taken to be."""
    if path not in known:
        known[path] = "://" in path or os.path.exists(path)
    return known[path]


def write(
    path: str | os.PathLike[str], conversations: Sequence[Conversation], *, format: str
) -> None:
    """Writes a file of conversations, whole or not at all.

    Raises:
      ConfigError: the format is not known.
      DataError: a conversation cannot be said in it, or the file cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is not known{nearest(format, FORMATS)}")
    lines = []
    for number, conversation in enumerate(conversations, start=1):
        try:
            lines.append(_dump(to_record(conversation, format)))
        except FieldError as e:
            raise DataError(
                f"{path}: record {number} ({conversation.id}): {e.field}: {e.message}"
            ) from None
    body = "\n".join(lines) if format == "ours" else "[\n" + ",\n".join(lines) + "\n]"
    beside = f"{os.fspath(path)}.part"
    try:
        Path(beside).write_text(body + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror}") from e


def _dump(record: dict[str, Any]) -> str:
    """JSON with its letters as they are, but for halves of surrogate pairs."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(record)
    return text


def kinds(conversations: Iterable[Conversation]) -> dict[str, int]:
    """How many conversations there are of each kind."""
    found = collections.Counter(conversation.kind for conversation in conversations)
    return {kind: found[kind] for kind in ("video", "image", "text")}
