"""Records of VideoChat2-IT: a file and a list `QA` of `i`, `q` and `a` (spec stage3 10.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iv2_jax.data.instruct import fields
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn, seconds
from iv2_jax.data.records import FieldError

_FIELDS = ("video", "image", "QA", "start", "end", "id")


def from_record(item: Mapping[str, Any]) -> Conversation:
    """Reads a record; see `formats.from_record`."""
    fields.check_spelling(item, _FIELDS)
    if "video" in item and "image" in item:
        raise FieldError("image", "is given beside 'video': a record has one file")
    kind = next((kind for kind in ("video", "image") if kind in item), None)
    start, end = seconds(item.get("start"), item.get("end"))
    if (start is None) != (end is None):
        missing = "start" if start is None else "end"
        raise FieldError(missing, "is missing: a clip has both start and end, or neither")
    media = () if kind is None else (Medium(kind, fields.path(item[kind], kind), start, end),)
    if not media and start is not None:
        raise FieldError("start", "is given without a video")
    turns = []
    if "QA" not in item:
        raise FieldError("QA", f"is missing; there are {', '.join(sorted(item)) or 'no fields'}")
    for at, entry in enumerate(fields.listed(item["QA"], "QA", "questions and answers")):
        field = f"QA[{at}]"
        entry = fields.entry(entry, field, ("i", "q", "a"), ("a",))
        answer = fields.text(entry["a"], f"{field}.a")
        if not answer.strip():
            raise FieldError(f"{field}.a", "is empty: there is nothing to learn from")
        question = fields.text(entry.get("q", ""), f"{field}.q")
        turns.append(Turn(question, answer, fields.text(entry.get("i", ""), f"{field}.i")))
    return Conversation(tuple(turns), media, id=fields.identifier(item))


def to_record(conversation: Conversation) -> dict[str, Any]:
    """Writes a record; see `formats.to_record`."""
    if len(conversation.media) > 1 or any(turn.media for turn in conversation.turns):
        raise FieldError("media", "videochat holds one medium, in front; write llava or ours")
    record: dict[str, Any] = {"id": conversation.id} if conversation.id else {}
    for medium in conversation.media:
        record[medium.kind] = medium.path
        if medium.start is not None and medium.end is None:
            raise FieldError("end", "is missing, and videochat needs it beside start")
        if medium.end is not None:
            record |= {"start": medium.start or 0.0, "end": medium.end}
    record["QA"] = [
        {"i": turn.instruction, "q": turn.question, "a": turn.answer} for turn in conversation.turns
    ]
    return record
