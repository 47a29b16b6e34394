"""The clip record, and the checks of every field of a record written as JSON."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

_FIELDS = (
    "id",
    "path",
    "start",
    "end",
    "captions",
    "label",
    "labels",
    "qa",
    "split",
    "group",
    "audio",
    "sound",
    "crop",
    "options",
    "answers",
    "file",  # the rest are spellings of the development pack
    "topic",
    "action",
    "transcript",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """One clip of a data set.

    Attributes:
      id: unique name within the manifest.
      path: video, picture or sound file, folder of frames, or URL; absolute, or relative to the
        working directory. Empty for text alone.
      start: first second of the clip within the file, None for its beginning.
      end: second at which the clip ends (not included), None for the end of the file.
      captions: modality (`video`, `audio`, `speech`, …) to texts.
      labels: name of a label set to the label.
      qa: (question, answer) pairs.
      split: name of the split it belongs to.
      group: clips of one group belong on one side of a split.
      audio: whether the file has sound; None when not known.
      frames: number of frames of a folder of frames; None for videos.
      sound: file or URL of the clip's sound, where it is not the file's own track.
      crop: (x0, y0, x1, y1), the pixels of a picture that count; None for all.
      options: texts of a multiple choice.
      answers: places of the right ones among `options`.
    """

    id: str
    path: str
    start: float | None = None
    end: float | None = None
    captions: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, str | int] = dataclasses.field(default_factory=dict)
    qa: tuple[tuple[str, str], ...] = ()
    split: str | None = None
    group: str | None = None
    audio: bool | None = None
    frames: int | None = None
    sound: str | None = None
    crop: tuple[float, float, float, float] | None = None
    options: tuple[str, ...] = ()
    answers: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The record as an object of our JSONL manifest; fields that are not set are left out."""
        record: dict[str, Any] = {"id": self.id}
        if self.path:
            record["path"] = self.path
        for name in ("start", "end", "split", "group", "audio", "sound"):
            value = getattr(self, name)
            if value is not None:
                record[name] = value
        if self.captions:
            record["captions"] = {k: list(v) for k, v in self.captions.items()}
        if self.labels:
            record["labels"] = dict(self.labels)
        if self.qa:
            record["qa"] = [list(pair) for pair in self.qa]
        for name in ("crop", "options", "answers"):
            if getattr(self, name):
                record[name] = list(getattr(self, name))
        return record


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with one record of a manifest."""

    line: int
    field: str
    message: str

    def describe(self, path: str | os.PathLike[str]) -> str:
        """`file:line: field: message`, the field left out where the whole line is meant."""
        field = f" {self.field}:" if self.field else ""
        return f"{path}:{self.line}:{field} {self.message}"


class FieldError(ValueError):
    """A field of a record that cannot be used; turned into a `Problem` with its line."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message


def clip_from_object(item: Any) -> Clip:
    """Checks every field of one record.

    Raises:
      FieldError: a field is missing or wrong; the message says what is allowed.
    """
    if not isinstance(item, dict):
        raise FieldError("", f"must be a JSON object, is {show(item)}")
    _check_spelling(item)
    captions = _captions(item)
    path = item.get("path", item.get("file", "" if any(captions.values()) else None))
    if not isinstance(path, str) or not (path.strip() or {"path", "file"}.isdisjoint(item)):
        raise FieldError("path", f"must be a non-empty text, is {show(path)}")
    options = texts(item.get("options", []), "options")
    start, end = (_seconds(item.get(name), name) for name in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise FieldError("end", f"must be later than start ({start or 0.0} s), is {end} s")
    return Clip(
        id=_identifier(item.get("id")),
        path=path,
        start=start,
        end=end,
        captions=captions,
        labels=_labels(item),
        qa=_qa(item.get("qa")),
        split=_text(item.get("split"), "split"),
        group=_text(item.get("group"), "group"),
        audio=_typed(item.get("audio"), "audio", bool, "true or false"),
        sound=_text(item.get("sound"), "sound"),
        crop=box(item.get("crop"), "crop"),
        options=options,
        answers=places(item.get("answers", []), "answers", len(options)),
    )


def _check_spelling(item: Mapping[str, Any]) -> None:
    """Refuses keys that are nearly one of ours; others belong to the user."""
    for key in item:
        close = misspelt(key, _FIELDS)
        if close and close not in item:
            raise FieldError(key, f"unknown field; did you mean {close!r}?")


@functools.lru_cache(maxsize=1024)
def misspelt(key: str, fields: tuple[str, ...]) -> str:
    """The field that a key is nearly spelt like, or nothing."""
    if key in fields:
        return ""
    return next(iter(difflib.get_close_matches(key, fields, n=1, cutoff=0.8)), "")


def show(value: Any) -> str:
    """A value as JSON, shortened for a message."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _identifier(value: Any) -> str:
    """The id as text; empty when it is to be made from the path."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise FieldError("id", f"must be a text or a whole number, is {show(value)}")
    return str(value)


def _typed(value: Any, field: str, kind: type, allowed: str) -> Any:
    """A value of exactly this type, or None."""
    if value is None or type(value) is kind:
        return value
    raise FieldError(field, f"must be {allowed}, is {show(value)}")


def _text(value: Any, field: str) -> str | None:
    """A text or None."""
    return _typed(value, field, str, "a text")


def _seconds(value: Any, field: str) -> float | None:
    """A time in seconds, not negative, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
        raise FieldError(field, f"must be a number of seconds from 0 on, is {show(value)}")
    return float(value)


def texts(value: Any, field: str) -> tuple[str, ...]:
    """One text or a list of texts.

    Raises:
      FieldError: it is neither.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise FieldError(field, f"must be a text or a list of texts, is {show(value)}")


def box(value: Any, field: str) -> tuple[float, float, float, float] | None:
    """(x0, y0, x1, y1) of a part of a picture, or None.

    Raises:
      FieldError: it is no such part.
    """
    if value is None:
        return None
    numbers = isinstance(value, list) and all(type(n) in (int, float) for n in value)
    if not numbers or len(value) != 4 or not (value[0] < value[2] and value[1] < value[3]):
        raise FieldError(
            field, f"must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1, is {show(value)}"
        )
    return tuple(float(n) for n in value)


def places(value: Any, field: str, count: int) -> tuple[int, ...]:
    """Places in a list of `count` texts.

    Raises:
      FieldError: one is no whole number from 0 to `count` - 1.
    """
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < count for n in value):
        raise FieldError(
            field, f"must be places among the {count} options, counted from 0, is {show(value)}"
        )
    return tuple(value)


def _captions(item: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Captions by modality; a transcript is the `speech` caption."""
    value = item.get("captions")
    if value is None:
        captions = {}
    elif isinstance(value, dict):
        captions = {name: texts(text, f"captions.{name}") for name, text in value.items()}
    else:
        captions = {"video": texts(value, "captions")}
    transcript = _text(item.get("transcript"), "transcript")
    if transcript:
        captions.setdefault("speech", (transcript,))
    return captions


def _label(value: Any, field: str) -> str | int:
    """A label: text or whole number."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise FieldError(field, f"must be a text or a whole number, is {show(value)}")
    return value


def _labels(item: Mapping[str, Any]) -> dict[str, str | int]:
    """Labels by name: `labels`, then `label`, then the pack's `topic` and `action`."""
    value = item.get("labels")
    if value is not None and not isinstance(value, dict):
        raise FieldError("labels", f"must be an object {{name: label}}, is {show(value)}")
    labels = {name: _label(label, f"labels.{name}") for name, label in (value or {}).items()}
    for name in ("label", "topic", "action"):
        if item.get(name) is not None:
            labels.setdefault(name, _label(item[name], name))
    return labels


def _qa(value: Any) -> tuple[tuple[str, str], ...]:
    """Question and answer pairs from either spelling."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise FieldError("qa", f"must be a list of pairs, is {show(value)}")
    pairs = []
    for i, pair in enumerate(value):
        if isinstance(pair, dict):
            pair = [pair.get("question"), pair.get("answer")]
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            raise FieldError(
                f"qa[{i}]",
                "must be [question, answer] or {question, answer} of two texts, is "
                f"{show(value[i])}",
            )
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)
