"""Records in LLaVA's style: who says what, with `<image>` and `<video>` where media stand.

Media named at the beginning of the first question stand in front of the conversation, as does a
single one at its end (LLaVA's own training moves it there) and one that nothing names. All others
stand within their question. A value of `system` is the instruction of the turns after it. In
records of videos alone `<image>` means a video too, as VideoChat-Flash's files have it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from iv2_jax.data.instruct import fields
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn, seconds
from iv2_jax.data.records import FieldError, misspelt, show

_FIELDS = ("id", "video", "image", "conversations", "start", "end")
_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_PLACE = re.compile(r"<(image|video)>")
_IN_FRONT = re.compile(r"\s*<(image|video)>[\n ]?")


def from_record(item: Mapping[str, Any]) -> Conversation:
    """Reads a record; see `formats.from_record`."""
    fields.check_spelling(item, _FIELDS)
    if "conversations" not in item:
        raise FieldError("conversations", f"is missing; there are {', '.join(sorted(item))}")
    entries = fields.listed(item["conversations"], "conversations", "values")
    media = _Media(_files(item, "image"), _files(item, "video"))
    turns: list[Turn] = []
    instruction, question = "", None
    for at, entry in enumerate(entries):
        field = f"conversations[{at}]"
        entry = fields.entry(entry, field, ("from", "value"), ("from", "value"))
        role, value = _role(entry["from"], field), fields.text(entry["value"], f"{field}.value")
        if role == "system":
            if question is not None:
                raise FieldError(f"{field}.from", "stands between a question and its answer")
            instruction = value
        elif (role == "gpt") == (question is None):
            wanted = "human" if question is None else "gpt"
            raise FieldError(f"{field}.from", f"must be {wanted!r}: they take turns")
        elif role == "human":
            question = value
        else:
            if not value.strip():
                raise FieldError(f"{field}.value", "the answer is empty: nothing to learn from")
            text, places = media.take(question or "", f"conversations[{at - 1}].value", not turns)
            turns.append(Turn(text, value, instruction, places))
            question = None
    if question is not None:
        raise FieldError(
            f"conversations[{len(entries) - 1}]",
            "the last question has no answer: questions and answers must be as many",
        )
    if not turns:
        raise FieldError("conversations", "has no question and answer")
    media.put_rest_in_front()
    return Conversation(tuple(turns), tuple(media.named), ordered=True, id=fields.identifier(item))


class _Media:
    """The files of a record, handed out in the order in which values name them.

    Attributes:
      named: those that were handed out.
    """

    def __init__(self, images: list[Medium], videos: list[Medium]) -> None:
        """Takes the files by kind."""
        self.named: list[Medium] = []
        self._left = {"image": images, "video": videos}
        self._only_videos = bool(videos) and not images

    def take(self, value: str, field: str, first: bool) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The question without the names of media, and the places of those within it."""
        in_front = False
        while first and (mark := _IN_FRONT.match(value)):
            self._next(mark[1], field)
            value, in_front = value[mark.end() :], True
        places: list[tuple[int, int]] = []
        text, done = "", 0
        for mark in _PLACE.finditer(value):
            text += value[done : mark.start()]
            done = mark.end()
            places.append((len(text), self._next(mark[1], field)))
        text += value[done:]
        at_end = first and not in_front and len(places) == 1 and not text[places[0][0] :].strip()
        return (text.strip(), ()) if at_end else (text, tuple(places))

    def _next(self, kind: str, field: str) -> int:
        """Number of the next file of a kind."""
        kind = "video" if self._only_videos else kind
        if not self._left[kind]:
            raise FieldError(field, f"has more <{kind}> than the record has files of that kind")
        self.named.append(self._left[kind].pop(0))
        return len(self.named) - 1

    def put_rest_in_front(self) -> None:
        """Files that no value names: in front, if none is named at all."""
        rest = self._left["image"] + self._left["video"]
        if rest and self.named:
            count = len(self.named)
            raise FieldError(
                "conversations",
                f"names {count} of {count + len(rest)} files; put <image> or <video> for each",
            )
        self.named += rest


def _role(value: Any, field: str) -> str:
    """human, gpt or system."""
    if not isinstance(value, str) or value not in _ROLES:
        close = misspelt(str(value).lower(), tuple(_ROLES)) or (
            str(value).lower() if str(value).lower() in _ROLES else ""
        )
        hint = f"; did you mean {close!r}?" if close else f"; known: {', '.join(_ROLES)}"
        raise FieldError(f"{field}.from", f"{show(value)} is no speaker{hint}")
    return _ROLES[value]


def _files(item: Mapping[str, Any], kind: str) -> list[Medium]:
    """The record's media of one kind, in order."""
    value = item.get(kind)
    if value is None:
        return []
    paths = [value] if isinstance(value, str) else fields.listed(value, kind, "paths")
    if kind == "image":
        return [Medium(kind, fields.path(path, kind)) for path in paths]
    ends = []
    for name in ("start", "end"):
        given = item.get(name)
        given = given if isinstance(given, list) else [given] * len(paths)
        if len(given) != len(paths):
            raise FieldError(name, f"has {len(given)} entries for {len(paths)} files")
        ends.append(given)
    return [
        Medium(kind, fields.path(path, kind), *seconds(start, end))
        for path, start, end in zip(paths, *ends, strict=True)
    ]


def to_record(conversation: Conversation) -> dict[str, Any]:
    """Writes a record; see `formats.to_record`."""
    for at, turn in enumerate(conversation.turns):
        if found := _PLACE.search(turn.question):
            raise FieldError(f"qa[{at}].question", f"has {found[0]}, in llava a place of a medium")
    wanted = _renumbered(conversation)
    entries: list[dict[str, str]] = []
    instruction = ""
    for at, turn in enumerate(wanted.turns):
        if turn.instruction != instruction:
            entries.append({"from": "system", "value": turn.instruction})
            instruction = turn.instruction
        front = wanted.front if at == 0 else ()
        text, done = "".join(f"<{wanted.media[n].kind}>\n" for n in front), 0
        for place, number in turn.media:
            text += f"{turn.question[done:place]}<{wanted.media[number].kind}>"
            done = place
        entries.append({"from": "human", "value": text + turn.question[done:]})
        entries.append({"from": "gpt", "value": turn.answer or ""})
    record: dict[str, Any] = {"id": conversation.id} if conversation.id else {}
    for kind in ("image", "video"):
        chosen = [medium for medium in wanted.media if medium.kind == kind]
        if chosen:
            record[kind] = chosen[0].path if len(chosen) == 1 else [m.path for m in chosen]
        for name in ("start", "end") if kind == "video" else ():
            values = [getattr(medium, name) for medium in chosen]
            if any(value is not None for value in values):
                record[name] = values[0] if len(values) == 1 else values
    record["conversations"] = entries
    again = from_record(record)
    if (again.turns, again.media) != (wanted.turns, wanted.media):
        raise FieldError(
            "media", "llava cannot say that they stand there, it would put them in front"
        )
    return record


def _renumbered(conversation: Conversation) -> Conversation:
    """The same with media numbered in the order in which they stand."""
    inline = [number for turn in conversation.turns for _, number in turn.media]
    order = [*conversation.front, *inline]
    new = {number: at for at, number in enumerate(order)}
    turns = (
        dataclasses.replace(turn, media=tuple((place, new[n]) for place, n in turn.media))
        for turn in conversation.turns
    )
    return dataclasses.replace(
        conversation, turns=tuple(turns), media=tuple(conversation.media[n] for n in order)
    )
