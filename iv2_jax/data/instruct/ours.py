"""Our own records: those of a manifest with `qa`, and all that the other formats can say.

A file is named by `video`, `image` or `path` (an image by its ending), with `start` and `end`;
several by `media`, a list of such objects. `qa` has `[question, answer]` or objects with
`question`, `answer`, `instruction` and `media`: `[[place, medium], ...]`, the letters of the
question before a medium and its number in `media`. `instruction` of the record is that of every
turn without one. `ordered` says that turns refer to earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iv2_jax.data.instruct import fields
from iv2_jax.data.instruct.conversations import KINDS, Conversation, Medium, Turn, kind_of, seconds
from iv2_jax.data.records import FieldError, show

_FIELDS = (
    *("id", "path", "file", "video", "image", "media", "start", "end", "qa", "instruction"),
    *("ordered", "captions", "label", "labels", "split", "group", "audio", "sound", "options"),
    *("answers", "crop", "topic", "action", "transcript"),
)


def from_record(item: Mapping[str, Any]) -> Conversation:
    """Reads a record; see `formats.from_record`."""
    fields.check_spelling(item, _FIELDS)
    given = [key for key in ("media", "path", "file", "video", "image") if item.get(key)]
    if len(given) > 1:
        raise FieldError(given[1], f"is given beside {given[0]!r}; several files go into `media`")
    if given == ["media"]:
        media = tuple(
            _medium(entry, f"media[{at}]")
            for at, entry in enumerate(fields.listed(item["media"], "media", "files"))
        )
    elif given:
        media = (_medium({k: item[k] for k in (*given, "start", "end") if k in item}, ""),)
    else:
        media = ()
    shared = fields.text(item.get("instruction", ""), "instruction")
    ordered = item.get("ordered", False)
    if not isinstance(ordered, bool):
        raise FieldError("ordered", f"must be true or false, is {show(ordered)}")
    if "qa" not in item:
        raise FieldError("qa", f"is missing; there are {', '.join(sorted(item)) or 'no fields'}")
    turns = tuple(
        _our_turn(pair, f"qa[{at}]", shared)
        for at, pair in enumerate(fields.listed(item["qa"], "qa", "questions and answers"))
    )
    return Conversation(turns, media, ordered, fields.identifier(item))


def _medium(entry: Any, field: str) -> Medium:
    """A file with its kind: as it is named, else by its ending."""
    keys = ("path", "file", "video", "image")
    entry = fields.entry(entry, field, (*keys, "start", "end"), ())
    dot = f"{field}." if field else ""
    key = next((key for key in keys if key in entry), None)
    if key is None:
        raise FieldError(field, "names no file: give video, image or path")
    path = fields.path(entry[key], f"{dot}{key}")
    try:
        ends = seconds(entry.get("start"), entry.get("end"))
    except FieldError as e:
        raise FieldError(f"{dot}{e.field}", e.message) from None
    return Medium(key if key in KINDS else kind_of(path), path, *ends)


def _our_turn(pair: Any, field: str, shared: str) -> Turn:
    """[question, answer] or an object."""
    if isinstance(pair, list):
        if len(pair) != 2:
            raise FieldError(field, f"must be [question, answer], is {show(pair)}")
        pair = {"question": pair[0], "answer": pair[1]}
    known = ("question", "answer", "instruction", "media")
    pair = fields.entry(pair, field, known, ("question", "answer"))
    places = pair.get("media", [])
    good = isinstance(places, list) and all(
        isinstance(place, list) and list(map(type, place)) == [int, int] for place in places
    )
    if not good:
        raise FieldError(f"{field}.media", f"must be [[place, medium], ...], is {show(places)}")
    return Turn(
        fields.text(pair["question"], f"{field}.question"),
        fields.text(pair["answer"], f"{field}.answer"),
        fields.text(pair.get("instruction", shared), f"{field}.instruction"),
        tuple((place, number) for place, number in places),
    )


def to_record(conversation: Conversation) -> dict[str, Any]:
    """Writes a record, always with `media`, which names the kinds; see `formats.to_record`."""
    record: dict[str, Any] = {"id": conversation.id} if conversation.id else {}
    if conversation.media:
        record["media"] = [
            {m.kind: m.path}
            | {k: v for k, v in (("start", m.start), ("end", m.end)) if v is not None}
            for m in conversation.media
        ]
    shared = conversation.turns[0].instruction
    if shared:
        record["instruction"] = shared
    if conversation.ordered:
        record["ordered"] = True
    record["qa"] = []
    for turn in conversation.turns:
        if turn.instruction == shared and not turn.media:
            record["qa"].append([turn.question, turn.answer])
            continue
        pair: dict[str, Any] = {"question": turn.question, "answer": turn.answer}
        if turn.instruction != shared:
            pair["instruction"] = turn.instruction
        if turn.media:
            pair["media"] = [list(place) for place in turn.media]
        record["qa"].append(pair)
    return record
