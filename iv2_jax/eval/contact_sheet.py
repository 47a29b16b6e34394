"""A picture of retrieval: what was asked for, the right clip, and what was found."""

from __future__ import annotations

import bisect
import dataclasses
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from iv2_jax.data.modalities import WITH_PICTURES
from iv2_jax.data.pipeline import DataConfig
from iv2_jax.errors import ConfigError
from iv2_jax.eval import retrieval
from iv2_jax.eval.retrieval_task import RetrievalResult, open_loader

TILE, GAP, MARGIN = 112, 6, 16
TEXT_WIDTH, TEXT_LINES, STRIP_FRAMES = 250, 4, 4
RIGHT, WRONG, INK, FAINT, PAPER, BLANK = (
    (30, 140, 70),
    (176, 184, 192),
    (28, 34, 42),
    (96, 106, 118),
    (255, 255, 255),
    (226, 230, 234),
)
_BORDER, _CAPTION, _HEADER = 4, 20, 34


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of the sheet.

    Attributes:
      text: The query.
      rank: Place of the best right clip, from 1 on.
      right: Column of that clip in the scores.
      found: Columns of the best candidates, best first.
      scores: Their scores.
      is_right: Which of them are right.
    """

    text: str
    rank: int
    right: int
    found: tuple[int, ...]
    scores: tuple[float, ...]
    is_right: tuple[bool, ...]


def choose_examples(result: RetrievalResult, *, rows: int = 8, top: int = 5) -> list[Example]:
    """Queries spread evenly from the best answered to the worst, always the same ones.

    Args:
      result: Of retrieval.
      rows: Queries, or all texts if there are fewer.
      top: Candidates shown of each.
    """
    scores, relevant = result.t2v, result.relevant.T
    rank = retrieval.ranks(scores, relevant)
    # The best with the clearest lead first, so that the order does not hang on the list's.
    best = np.where(relevant, scores, -np.inf).max(axis=1)
    rival = np.where(relevant, -np.inf, scores).max(axis=1, initial=-np.inf)
    order = np.lexsort((rival - best, rank))
    places = np.linspace(0, len(order) - 1, min(rows, len(order))).round().astype(int)
    examples = []
    for query in order[np.unique(places)]:
        found = np.argsort(-scores[query], kind="stable")[:top]
        right = np.where(relevant[query], scores[query], -np.inf).argmax()
        examples.append(
            Example(
                result.texts[query],
                int(rank[query]) + 1,
                int(right),
                tuple(found.tolist()),
                tuple(scores[query][found].tolist()),
                tuple(relevant[query][found].tolist()),
            )
        )
    return examples


def read_frames(
    data: DataConfig, positions: Iterable[int], *, batch_size: int = 16
) -> dict[int, np.ndarray]:
    """Pictures of clips as evaluation sees them.

    Args:
      data: How the clips were read; of sound alone there are no pictures.
      positions: In the split's list.
      batch_size: Clips read at once.

    Returns:
      Position -> (T, S, S, 3) uint8; clips that do not decode are missing.
    """
    wanted, found = set(positions), {}
    if data.media not in WITH_PICTURES:
        return {}
    with open_loader(data, batch_size, seed=0) as loader:
        for batch in loader:
            for at, video, valid in zip(
                batch["index"], batch["video"], batch["valid"], strict=True
            ):
                if valid and int(at) in wanted:
                    found[int(at)] = np.array(video)
            if wanted <= found.keys():
                break
    return found


def draw_sheet(
    examples: Sequence[Example],
    frames: Mapping[int, np.ndarray],
    clip_names: Sequence[str],
    *,
    title: str = "",
) -> Image.Image:
    """Draws the sheet.

    Args:
      examples: Rows.
      frames: (T, S, S, 3) uint8 of clips by their column in the scores; a clip without has a grey
        tile with its name.
      clip_names: Of every column.
      title: Above everything.

    Raises:
      ConfigError: There is nothing to draw.
    """
    if not examples:
        raise ConfigError("a contact sheet needs at least one example")
    top = max(len(example.found) for example in examples)
    strip = STRIP_FRAMES * TILE + (STRIP_FRAMES - 1) * 2
    columns = (MARGIN, MARGIN + TEXT_WIDTH + 2 * GAP)
    columns += (columns[1] + strip + 3 * GAP,)
    height = TILE + 2 * _BORDER + _CAPTION + 2 * GAP
    header = _HEADER + (30 if title else 0)
    size = (
        columns[2] + top * (TILE + 2 * _BORDER + GAP) + MARGIN,
        header + len(examples) * height + MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, 10), _fitted(title, _font(18), size[0] - 2 * MARGIN), INK, _font(18))
    heads = ("asked for", "the right clip", "found, best first (right ones are green)")
    for x, head in zip(columns, heads, strict=True):
        draw.text((x, header - 22), head, FAINT, _font(14))
    for row, example in enumerate(examples):
        y = header + row * height
        _draw_query(draw, example, columns[0], y)
        _draw_strip(sheet, frames.get(example.right), clip_names[example.right], columns[1], y)
        _draw_found(sheet, example, frames, clip_names, columns[2], y)
    return sheet


def retrieval_sheet(
    result: RetrievalResult, data: DataConfig, *, rows: int = 8, top: int = 5, title: str = ""
) -> Image.Image:
    """Chooses examples of a result, reads their clips and draws them.

    Args:
      result: Of `evaluate_retrieval` over `data`.
      data: As it was evaluated.
      rows: Queries.
      top: Candidates of each.
      title: Above everything.
    """
    examples = choose_examples(result, rows=rows, top=top)
    shown = {column for e in examples for column in (e.right, *e.found)}
    position = {column: int(result.index[column]) for column in shown}
    frames = read_frames(data, position.values())
    by_column = {column: frames[at] for column, at in position.items() if at in frames}
    return draw_sheet(examples, by_column, [clip.id for clip in result.clips], title=title)


def _draw_query(draw: ImageDraw.ImageDraw, example: Example, x: int, y: int) -> None:
    """The text and the place of the right clip."""
    font = _font(15)
    for i, line in enumerate(wrap(example.text, font, TEXT_WIDTH, TEXT_LINES)):
        draw.text((x, y + 4 + i * 20), line, INK, font)
    colour = RIGHT if example.rank == 1 else FAINT
    draw.text((x, y + TILE - 10), f"found at place {example.rank}", colour, _font(14))


def _draw_strip(sheet: Image.Image, video: np.ndarray | None, name: str, x: int, y: int) -> None:
    """Frames of the right clip side by side, its name below."""
    for i in range(STRIP_FRAMES):
        frame = None
        if video is not None:
            frame = video[round(i * (len(video) - 1) / max(STRIP_FRAMES - 1, 1))]
        sheet.paste(_tile(frame), (x + i * (TILE + 2), y + _BORDER))
    width = STRIP_FRAMES * (TILE + 2)
    below = (x, y + TILE + 2 * _BORDER + 1)
    ImageDraw.Draw(sheet).text(below, _fitted(name, _font(13), width), FAINT, _font(13))


def _draw_found(
    sheet: Image.Image,
    example: Example,
    frames: Mapping[int, np.ndarray],
    clip_names: Sequence[str],
    x: int,
    y: int,
) -> None:
    """The candidates with frames around them, and their scores and names below."""
    draw = ImageDraw.Draw(sheet)
    outer = TILE + 2 * _BORDER
    for i, column in enumerate(example.found):
        left = x + i * (outer + GAP)
        right = example.is_right[i]
        draw.rectangle((left, y, left + outer - 1, y + outer - 1), RIGHT if right else WRONG)
        video = frames.get(column)
        frame = None if video is None else video[len(video) // 2]
        sheet.paste(_tile(frame), (left + _BORDER, y + _BORDER))
        note = _fitted(f"{example.scores[i]:.2f}  {clip_names[column]}", _font(13), outer)
        draw.text((left, y + outer + 1), note, RIGHT if right else FAINT, _font(13))


def _tile(frame: np.ndarray | None) -> Image.Image:
    """A frame at the sheet's size; grey where there is none."""
    if frame is None:
        return Image.new("RGB", (TILE, TILE), BLANK)
    return Image.fromarray(frame).resize((TILE, TILE), Image.Resampling.LANCZOS)


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    """Pillow's own font, so that the sheet looks alike everywhere."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    """Whether the font draws more than its box for characters it does not have."""
    font = _font(32)
    mask, missing = font.getmask(character), font.getmask("\uffff")
    return mask.size != missing.size or bytes(mask) != bytes(missing)


def readable(text: str) -> str:
    """A text in characters that the font has: what it lacks becomes its name, such as [fire]."""
    parts = []
    for character in " ".join(text.split()):
        category = unicodedata.category(character)[0]
        if category == "C":  # control and format characters
            continue
        if character == " " or _has_glyph(character):
            parts.append(character)
            continue
        plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode().strip()
        if plain:
            parts.append(plain)
        elif category != "M":  # accents of their own
            name = unicodedata.name(character, f"U+{ord(character):04X}").lower()
            parts.append(f"[{name.replace('cjk unified ideograph-', 'U+')}]")
    return " ".join("".join(parts).split())


def wrap(text: str, font: Any, width: int, lines: int) -> list[str]:
    """Breaks a text into at most `lines` lines of `width` pixels; the rest becomes an ellipsis."""
    out: list[str] = []
    words = readable(text[:2000]).split()
    while words and len(out) < lines:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        if words and len(out) == lines - 1:
            line += " ..."
        out.append(_fitted(line, font, width))
    return out or ["(no text)"]


def _fitted(text: str, font: Any, width: int) -> str:
    """A line cut to a width in pixels."""
    text = readable(text)
    if font.getlength(text) <= width:
        return text
    lengths = range(len(text))
    fits = bisect.bisect_right(lengths, width, key=lambda n: font.getlength(text[:n] + "..."))
    return text[: max(fits - 1, 0)].rstrip() + "..."
