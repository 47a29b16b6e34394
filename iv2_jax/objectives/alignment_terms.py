"""The loss terms of stage 2 by name: what each compares, and in which media it runs (spec 6.6).

| kind | terms | what it does |
|---|---|---|
| contrast | vtc atc avc avtc | pairs in the joint space against all others of the batch |
| match | vtm atm avtm | true pairs against hard negatives, by the fusion layers |
| words | mlm amlm avmlm | guesses hidden words of a caption that has read its media |
| teacher | uta | the vision tower's features against a frozen teacher's |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MediaKind = Literal["video", "audio", "audiovisual"]


@dataclass(frozen=True)
class Term:
    """One loss term.

    Attributes:
        kind: what is done, see the module's docstring.
        media: which features meet the other side; `audiovisual` joins sound and picture.
        other: the other side of a contrast, `text` or `video`.
    """

    kind: Literal["contrast", "match", "words", "teacher"]
    media: MediaKind
    other: Literal["text", "video"] = "text"


TERMS: dict[str, Term] = {
    "vtc": Term("contrast", "video"),
    "atc": Term("contrast", "audio"),
    "avc": Term("contrast", "audio", "video"),
    "avtc": Term("contrast", "audiovisual"),
    "vtm": Term("match", "video"),
    "atm": Term("match", "audio"),
    "avtm": Term("match", "audiovisual"),
    "mlm": Term("words", "video"),
    "amlm": Term("words", "audio"),
    "avmlm": Term("words", "audiovisual"),
    "uta": Term("teacher", "video"),
}

_PICTURES = ("vtc", "vtm", "mlm", "uta")
_SOUND = ("atc", "atm", "amlm")

# Which terms a batch of each media type runs, in the order they are reported.
MEDIA_TERMS: dict[str, tuple[str, ...]] = {
    "image": _PICTURES,
    "video": _PICTURES,
    "audio": _SOUND,
    "audio_video": tuple(TERMS),
    # Words alone: the text layers' own masked language modelling, which the original has not.
    "text": ("mlm",),
}
