"""Which option a reply to a multiple-choice question chooses (spec stage3 11.1).

The strict rule takes a reply only if it names one option the way the prompt asks for: by its
letter, in front. A reply that is empty, names two options, or says something else chooses none and
counts as wrong; so does every reply that one could only guess from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PARSERS = ("strict", "released")

# A letter in front, in brackets or followed by a mark, such as "(B)", "B.", "[b]: a dog", "B".
_MARKED = re.compile(r"[\s\"'*]*[(\[{<]?\s*([A-Za-z])\s*([)\]}>]|[.:,;*\"']+|$)", re.ASCII)
# A letter in front with nothing but space behind it, as in "B a dog" but also in "A dog".
_BARE = re.compile(r"[\s\"'*]*[(\[{<]?\s*([A-Za-z])\s+(?=\S)", re.ASCII)
# Further options: in brackets anywhere, or joined to the first one.
_BRACKETED = re.compile(r"[(\[{<]\s*([A-Za-z])\s*[)\]}>]", re.ASCII)
_CLOSED = re.compile(r"(?:^|(?<=[\s,;/&]))([A-Z])\s*[)\]}>]", re.ASCII)
_JOINED = re.compile(
    r"\s*(?:[,/&+|]|(?i:or|and)\b)\s*"
    r"(?:[(\[{<]?\s*([A-Z])(?=\W|$)|[(\[{<]?\s*([A-Za-z])\s*(?:[)\]}>.:,;]|$))",
    re.ASCII,
)


def letter(option: int) -> str:
    """The letter of an option, counted from 0: A, B, ...

    Raises:
      ValueError: there are only 26 letters.
    """
    if not 0 <= option < 26:
        raise ValueError(f"option {option}: options have the letters A to Z, 26 at most")
    return chr(ord("A") + option)


def first_line(reply: str) -> str:
    """The first line of a reply that has anything in it, as the original cuts it."""
    lines = reply.strip().splitlines()
    return lines[0].strip() if lines else ""


def parse_choice(
    reply: str,
    options: Sequence[str],
    *,
    accept_letter: bool = True,
    accept_text: bool = False,
) -> int | None:
    """Gives the option that a reply chooses by the strict rule.

    Args:
      reply: what the model wrote behind the answer prefix; with or without the bracket that the
        prefix opens.
      options: texts of the options, 26 at most.
      accept_letter: take a reply that names an option by its letter.
      accept_text: also take a reply that is, but for case, space and a full stop, the text of
        exactly one option.

    Returns:
      Number of the option, from 0 on; None if the reply chooses none, or more than one.
    """
    line = first_line(reply)
    chosen = _by_letter(line, options) if accept_letter else None
    if chosen is None and accept_text:
        same = [i for i, text in enumerate(options) if _plain(text) == _plain(line) != ""]
        chosen = same[0] if len(same) == 1 else None
    return chosen


def _by_letter(line: str, options: Sequence[str]) -> int | None:
    """The option whose letter stands in front, if no other is named."""
    found = _MARKED.match(line)
    closed = found is not None and found[2][:1] in ("", *")]}>")
    # "B. a dog" is marked, "e.g. a dog" and "I'm" are not.
    marked = closed or (found is not None and not line[found.end() : found.end() + 1].isalnum())
    found = found or _BARE.match(line)
    # "A dog" begins with a word; "A dog runs" with option A's letter only if A says so.
    if found is None or not (marked or _says(line[found.end() :], options, found[1])):
        return None
    chosen = _number(found[1], options)
    if chosen is None:
        return None
    rest = line[found.end() :]
    names = [*_BRACKETED.findall(line), *_CLOSED.findall(rest)]
    joined = _JOINED.match(line, found.end(1))
    if joined is None:
        joined = _JOINED.match(rest)
    names += [joined[1] or joined[2]] if joined else []
    others = {_number(name, options) for name in names} - {None, chosen}
    return None if others and not _says(rest, options, found[1]) else chosen


def _says(rest: str, options: Sequence[str], name: str) -> bool:
    """Whether what stands behind an option's letter is that option's text."""
    number = _number(name, options)
    return number is not None and _plain(rest) == _plain(options[number]) != ""


def _number(name: str, options: Sequence[str]) -> int | None:
    """The number of an option by its letter, or None if there is no such option."""
    number = ord(name.upper()) - ord("A")
    return number if number < len(options) else None


def _plain(text: str) -> str:
    """A text without case, outer marks and doubled space."""
    return " ".join(text.split()).strip(" .\"'-–—").casefold()


def is_right(reply: str, options: Sequence[str], answer: int, *, parser: str = "strict") -> bool:
    """Whether a reply counts as right.

    Args:
      reply: what the model wrote behind the answer prefix.
      options: texts of the options.
      answer: number of the right one; options with its very text are right, too.
      parser: one of `PARSERS`. `released`: the original's `check_ans`, for comparison with
        published numbers alone: it looks whether the first word is part of the right option's
        letter in brackets or the other way round, so that an empty reply is right.

    Raises:
      ValueError: there is no such parser or answer.
    """
    if parser not in PARSERS:
        raise ValueError(f"parser {parser!r}: choose one of {', '.join(PARSERS)}")
    if not 0 <= answer < len(options):
        raise ValueError(f"answer={answer} is none of {len(options)} options")
    if parser == "released":
        opened = reply if reply.lstrip().startswith("(") else f"({reply.strip()}"
        said = first_line(opened).lower().split(" ")[0].replace(".", "")
        gold = f"({letter(answer)})".lower()
        return said in gold or gold in said
    chosen = parse_choice(reply, options)
    return chosen is not None and options[chosen] == options[answer]
