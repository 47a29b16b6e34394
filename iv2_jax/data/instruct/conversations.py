"""Conversations about videos, pictures or nothing: what every file format is read into."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

from iv2_jax.data import captions, stills
from iv2_jax.data.records import Clip, FieldError, show

KINDS = ("video", "image")


@dataclasses.dataclass(frozen=True, slots=True)
class Medium:
    """A video, a stretch of one, or a picture.

    Attributes:
      kind: 'video' or 'image'.
      path: file, folder of frames or URL.
      start: first second, None for the beginning.
      end: second at which it ends (not included), None for the end of the file.
    """

    kind: str
    path: str
    start: float | None = None
    end: float | None = None

    def clip(self) -> Clip:
        """The same as a record that `data.sources` opens."""
        return Clip(self.path, self.path, self.start, self.end)


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer.

    Attributes:
      question: what is asked; empty where the instruction asks already (captions).
      answer: the reply; None for one that is to be generated, in the last turn only.
      instruction: sentence on the task; that of the first turn shown precedes everything.
      media: (letters of the question before it, number of the medium) of media that stand within
        the question. Media that no turn names stand in front of the conversation.
    """

    question: str
    answer: str | None
    instruction: str = ""
    media: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """What is said about some media, or about nothing.

    Attributes:
      turns: questions and answers in order.
      media: videos and pictures.
      ordered: turns refer to earlier ones; False: they are independent, and training may show them
        in any order.
      id: name, for messages.
      message: sentence after the media in front, such as `prompts.frames_message`.
    """

    turns: tuple[Turn, ...]
    media: tuple[Medium, ...] = ()
    ordered: bool = False
    id: str = ""
    message: str = ""

    @property
    def kind(self) -> str:
        """'video' if there is one, else 'image' if there is one, else 'text'."""
        kinds = {medium.kind for medium in self.media}
        return next((kind for kind in KINDS if kind in kinds), "text")

    @property
    def front(self) -> tuple[int, ...]:
        """Numbers of the media in front."""
        inline = {number for turn in self.turns for _, number in turn.media}
        return tuple(i for i in range(len(self.media)) if i not in inline)


def check(conversation: Conversation) -> Conversation:
    """Refuses what no file may hold; gives the conversation back.

    Raises:
      FieldError: the name of the field (in our own format's words) and what is wrong.
    """
    if not conversation.turns:
        raise FieldError("qa", "has no turn; a conversation needs a question and an answer")
    named: list[int] = []
    for at, turn in enumerate(conversation.turns):
        if turn.answer is None or not turn.answer.strip():
            raise FieldError(f"qa[{at}].answer", "is empty: there is nothing to learn from")
        for place, number in turn.media:
            if not 0 <= number < len(conversation.media):
                raise FieldError(
                    f"qa[{at}].media",
                    f"names medium {number}; there are {len(conversation.media)}, from 0 on",
                )
            if not 0 <= place <= len(turn.question):
                raise FieldError(
                    f"qa[{at}].media",
                    f"place {place} is outside the question of {len(turn.question)} letters",
                )
            named.append(number)
        if list(turn.media) != sorted(turn.media):
            raise FieldError(f"qa[{at}].media", f"must be sorted by place, is {turn.media}")
    if len(named) > len(set(named)):
        raise FieldError("qa", "a medium stands in two places; list its file twice in `media`")
    return conversation


def captioned(
    clips: Iterable[Clip], *, caption: str = "video", min_words: int = 2, clean: bool = True
) -> list[Conversation]:
    """Clips with captions as conversations without questions, for caption alignment.

    Each caption is a turn of its own; with `SequenceConfig.one_turn` a visit shows one of them.

    Args:
      clips: records of a manifest.
      caption: name of the captions.
      min_words: captions of fewer words are left out, and clips that have no other (spec stage3
        5.3).
      clean: lower case without punctuation, as the original has them (spec stage3 4.2).
    """
    found = []
    for clip in clips:
        texts = [captions.clean_text(t) if clean else t for t in clip.captions.get(caption, ())]
        turns = tuple(Turn("", text) for text in texts if len(text.split()) >= max(min_words, 1))
        if turns:
            media = ()
            if clip.path:
                media = (Medium(kind_of(clip.path), clip.path, clip.start, clip.end),)
            found.append(Conversation(turns, media, id=clip.id))
    return found


def kind_of(path: str) -> str:
    """'image' or 'video', by the ending of a path."""
    return "image" if path.lower().endswith(stills.EXTENSIONS) else "video"


def seconds(start: object, end: object) -> tuple[float | None, float | None]:
    """Checks the ends of a stretch.

    Raises:
      FieldError: one is no number of seconds, or they are the wrong way round.
    """
    for name, value in (("start", start), ("end", end)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < 1e9):
            raise FieldError(name, f"must be a number of seconds from 0 on, is {show(value)}")
    if end is not None and end <= (start or 0):
        raise FieldError("end", f"must be later than start ({start or 0} s), is {end} s")
    return (
        None if start is None else float(start),
        None if end is None else float(end),
    )


def joined(root: str, path: str) -> str:
    """A path under a folder or URL, unless it is absolute or a URL itself."""
    if not path or not root or "://" in path or os.path.isabs(path):
        return path
    return f"{root.rstrip('/')}/{path}" if "://" in root else os.path.join(root, path)
