"""The contact sheet: which queries, what is drawn where, and text that no font has."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from iv2_jax.errors import ConfigError
from iv2_jax.eval import contact_sheet
from iv2_jax.eval.retrieval_task import RetrievalResult

BLACK, WHITE = (np.full((4, 32, 32, 3), value, np.uint8) for value in (0, 255))


def result(ranks):
    """Text i finds clip i at place `ranks[i]`."""
    count = len(ranks)
    t2v = np.zeros((count, count), np.float32)
    for query, rank in enumerate(ranks):
        others = [c for c in range(count) if c != query]
        order = [*others[: rank - 1], query, *others[rank - 1 :]]
        t2v[query, order] = np.linspace(0.9, -0.9, count)
    texts = tuple(f"text {i}" for i in range(count))
    eye = np.eye(count, dtype=bool)
    return RetrievalResult({}, t2v.T, [], np.arange(count), texts, eye, np.ones(count, int))


def test_examples_go_from_the_best_to_the_worst():
    found = contact_sheet.choose_examples(result([1, 5, 3, 2, 1]), rows=3, top=4)
    assert [example.rank for example in found] == [1, 2, 5]
    assert all(example.found[example.rank - 1] == example.right for example in found[:2])
    assert [example.is_right for example in found][:2] == [
        (True, False, False, False),
        (False, True, False, False),
    ]
    assert not any(found[2].is_right)
    assert found == contact_sheet.choose_examples(result([1, 5, 3, 2, 1]), rows=3, top=4)
    assert len(contact_sheet.choose_examples(result([1, 2]), rows=8)) == 2


def test_right_ones_are_green_and_missing_clips_grey(tmp_path):
    examples = contact_sheet.choose_examples(result([1, 2, 3]), rows=3, top=3)
    frames = {0: BLACK, 1: WHITE}
    names = ["clip one", "clip two", "a clip whose name is far too long for its tile " * 3]
    sheet = contact_sheet.draw_sheet(examples, frames, names, title="Everything 🔥 " * 40)
    path = tmp_path / "sheet.jpg"
    sheet.save(path, quality=95)
    with Image.open(path) as image:
        image.load()
        assert image.size == sheet.size
    shorter = contact_sheet.draw_sheet(examples[:1], frames, names)
    assert sheet.width == shorter.width
    row = (sheet.height - shorter.height - 30) // 2  # 30 for the title
    assert row > contact_sheet.TILE
    pixels = np.asarray(sheet)
    left = sheet.width - contact_sheet.MARGIN - 3 * (contact_sheet.TILE + 8 + contact_sheet.GAP)
    for i, example in enumerate(examples):
        y = contact_sheet._HEADER + 30 + i * row
        for j, right in enumerate(example.is_right):
            x = left + j * (contact_sheet.TILE + 8 + contact_sheet.GAP)
            border = contact_sheet.RIGHT if right else contact_sheet.WRONG
            assert tuple(pixels[y + 1, x + 20]) == border
            inside = {0: (0, 0, 0), 1: (255, 255, 255), 2: contact_sheet.BLANK}
            assert tuple(pixels[y + 60, x + 60]) == inside[example.found[j]]


def test_nothing_to_draw_is_refused():
    with pytest.raises(ConfigError, match="at least one example"):
        contact_sheet.draw_sheet([], {}, [])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a 🔥\n\tb", "a [fire] b"),
        ("café", "cafe"),
        ("你", "[U+4f60]"),
        ("zero\u200bwidth \x07", "zerowidth"),
        ("", ""),
    ],
)
def test_odd_characters_become_readable(text, shown):
    assert contact_sheet.readable(text) == shown


def test_long_texts_are_wrapped_and_cut():
    font = contact_sheet._font(15)
    lines = contact_sheet.wrap("word " * 10_000, font, 200, 3)
    assert len(lines) == 3
    assert all(font.getlength(line) <= 200 for line in lines)
    assert lines[-1].endswith("...")
    assert contact_sheet.wrap("x" * 5000, font, 200, 3)[0].endswith("...")
    assert contact_sheet.wrap("", font, 200, 3) == ["(no text)"]
