"""Captions and class names as text for the text towers: cleaning and templates. Plain Python.

Chat prompts are another matter: see `prompts`.
"""

from __future__ import annotations

import os
import re

from iv2_jax.errors import ConfigError, DataError, nearest

_DELETED = str.maketrans("", "", ",.'!?\"()*#:;~")
_SPACED = str.maketrans("-/", "  ")
_SPACES = re.compile(r"\s{2,}")
_SLOT = "{}"
_FILE = "file:"

# Zero-shot action recognition (spec stage2 9.2).
ACTION_TEMPLATES = (
    "a photo of action {}",
    "a picture of action {}",
    "Human action of {}",
    "{}, an action",
    "{} this is an action",
    "{}, a video of action",
    "Playing action of {}",
    "{}",
    "Playing a kind of action, {}",
    "Doing a kind of action, {}",
    "Look, the human is {}",
    "Can you recognize the action of {}?",
    "Video classification of {}",
    "A video of {}",
    "The man is {}",
    "The woman is {}",
)
TEMPLATES = {"action": ACTION_TEMPLATES}

_SIDE = re.compile(
    r"\b(?:(?:left|right)(?:s|y|ward|wards|hand|handed|most)?"
    r"|(?:counter|anti)?-?clockwise)\b",
    re.IGNORECASE,
)


def clean_text(text: str, *, max_words: int = 0) -> str:
    """Cleans a caption as every text of the original is before it is cut into tokens.

    Lower case; the characters `,.'!?"()*#:;~` go, `-` and `/` become spaces, `<person>` becomes
    `person`; two or more white-space characters in a row become one space, a single one stays
    what it is; line ends, then spaces, go from the end, and spaces from the beginning (spec
    stage2 8.3). Emoji and every other character stay.

    Args:
      text: the caption, of any length; may be empty.
      max_words: at most so many words, split at spaces; 0 keeps all.

    Returns:
      The cleaned text, which may be empty.

    Raises:
      DataError: it is no text.
    """
    if not isinstance(text, str):
        raise DataError(f"a caption must be text, is {type(text).__name__}: {text!r:.80}")
    text = text.lower().translate(_DELETED).translate(_SPACED).replace("<person>", "person")
    text = _SPACES.sub(" ", text).rstrip("\n").strip(" ")
    if max_words:
        text = " ".join(text.split(" ", max_words)[:max_words])
    return text


def format_prompt(template: str, text: str) -> str:
    """Puts a text into the `{}` of a template; braces of the text itself mean nothing."""
    return template.replace(_SLOT, text)


def templates(prompt: str) -> tuple[str, ...]:
    """The templates that a config's `prompt` names.

    The 80 ImageNet and 28 Kinetics templates of the original's training corpora are not part of
    this package: give them as a file.

    Args:
      prompt: a key of `TEMPLATES`; one template, which has a `{}`; or `file:PATH` of a text file
        with a template a line.

    Returns:
      One or more templates, each with a `{}`.

    Raises:
      ConfigError: there is no such name or file, or a line without `{}`.
    """
    if prompt in TEMPLATES:
        return TEMPLATES[prompt]
    if prompt.startswith(_FILE):
        return _read_templates(prompt.removeprefix(_FILE))
    if _SLOT in prompt:
        return (prompt,)
    raise ConfigError(
        f"prompt {prompt!r} is not known{nearest(prompt, TEMPLATES)}; give a template with '{{}}', "
        f"one of {', '.join(TEMPLATES)}, or 'file:PATH' of a text file with a template a line"
    )


def _read_templates(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The lines of a file, all of which must have a slot."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"prompt file {path} cannot be read: {e}") from e
    for number, line in enumerate(lines, 1):
        if _SLOT not in line:
            raise ConfigError(f"prompt file {path}: template {number} has no '{{}}': {line!r}")
    if not lines:
        raise ConfigError(f"prompt file {path} has no templates")
    return tuple(lines)


def mentions_side(text: str) -> bool:
    """Whether an English caption or label speaks of left, right or a sense of rotation.

    Mirrored pictures make such a text wrong (spec stage2 trap 11.28). "Right" in its other
    meanings counts too: the price is a clip that is not mirrored.
    """
    return _SIDE.search(text) is not None
