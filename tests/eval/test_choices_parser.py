"""The strict answer parser and the released one, on adversarial replies."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iv2_jax.eval import answer_parser as parser

OPTIONS = ("The man runs.", "A dog", "Nobody", "Both (A) and (B)")


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        *[(reply, 1) for reply in ("B", "b", "(B)", "(b) a dog", "B.", "B)", "B) anything")],
        *[(reply, 1) for reply in ("[B]", "\n (B) A dog\n(C) Nobody", "**B**", '"B"', "B: A dog")],
        *[
            (reply, 1)
            for reply in ("B A dog", "b   a DOG.", "B, a dog that runs", "B) A man or so")
        ],
        *[(reply, 1) for reply in ("B.a dog", "B - a dog", "B.) x", "'B'.", "(B", "B) A/C")],
        ("A) The man runs.", 0),
        ("D) Both (A) and (B)", 3),
        ("C) nobody, and nothing else", 2),
        *[(reply, None) for reply in ("", " \n\t", "(", "()", ")", "((", "...", "<s>", "(E)", "Z")],
        *[(reply, None) for reply in ("The answer is C", "A man walks", "A dog", "I", "Be", "AB")],
        *[(reply, None) for reply in ("A or B", "A/B", "A, B", "(A)(B)", "A) or B)", "b, c")],
        *[(reply, None) for reply in ("A, B and C", "(A) x (B) y", "A) x B) y", "not A", "-A")],
        *[(reply, None) for reply in ("А", "Ａ", "ⓑ", "ı", "1", "(1)", "option B", "B\u0301")],
        *[(reply, None) for reply in ("A's", "A.M.", "c.f. that", "D'oh", "A/C unit", "B-", "C#")],
        ("Both (A) and (B)", None),
    ],
)
def test_strict(reply, chosen):
    assert parser.parse_choice(reply, OPTIONS) == chosen


def test_text_of_an_option_if_asked_for():
    def parse(reply, options=OPTIONS):
        return parser.parse_choice(reply, options, accept_text=True)

    assert [parse(r) for r in ("the man  runs", "A DOG.", "Nobody ran", "")] == [0, 1, None, None]
    assert parse("yes", ("Yes", "yes.")) is None
    assert parser.parse_choice("nobody", OPTIONS) is None


@given(st.integers(1, 26), st.data())
def test_every_marked_letter_is_found_and_no_other(count, data):
    options = [f"thing {i}" for i in range(count)]
    number = data.draw(st.integers(0, 25))
    name = parser.letter(number)
    name = data.draw(st.sampled_from((name, name.lower())))
    before = data.draw(st.sampled_from(("", "(", " (", "[", "\n")))
    after = data.draw(st.sampled_from((")", ".", "]", ":", "", f") thing {number}", ") something")))
    expected = number if number < count else None
    assert parser.parse_choice(before + name + after, options) == expected


@given(st.text(), st.lists(st.text(), min_size=1, max_size=26))
def test_any_text_gives_an_option_that_its_first_line_names(reply, options):
    chosen = parser.parse_choice(reply, options)
    if chosen is None:
        return
    line = parser.first_line(reply)
    assert 0 <= chosen < len(options)
    first = next(c for c in line if c in string.ascii_letters)
    assert first.upper() == parser.letter(chosen)
    assert parser.parse_choice(line, options) == chosen


@given(st.text(alphabet="()[]{} .,:;-_*\"'\n\t123"))
def test_a_reply_without_letters_is_never_right_but_by_the_released_rule(reply):
    assert not any(parser.is_right(reply, OPTIONS, answer) for answer in range(4))


def test_the_released_rule_takes_empty_replies():
    def released(reply, answer=2):
        return parser.is_right(reply, OPTIONS, answer, parser="released")

    assert [released(r) for r in ("", "(", "C", "C.", "c)", "(C) Nobody")] == [True] * 6
    assert [released(r) for r in ("B", "the answer is C", "C! or", "C.)")] == [False] * 3 + [True]
    assert released("", 0)


def test_options_of_the_same_text_are_right_together():
    assert parser.is_right("B", ("left", "left", "right"), 0)
    assert not parser.is_right("C", ("left", "left", "right"), 0)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="choose one of strict, released"):
        parser.is_right("A", OPTIONS, 0, parser="lax")
    with pytest.raises(ValueError, match="answer=4 is none of 4"):
        parser.is_right("A", OPTIONS, 4)
    with pytest.raises(ValueError, match="26 at most"):
        parser.letter(26)
