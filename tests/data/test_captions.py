"""Cleaning, templates, and captions that must not be mirrored."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iv2_jax.data import captions
from iv2_jax.data.captions import clean_text, mentions_side
from iv2_jax.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man, walking.", "a man walking"),
        ('It\'s a "dog" (brown)! Really? *yes* #1: ok; ~', "its a dog brown really yes 1 ok"),
        ("well-known and/or", "well known and or"),
        ("<person> talks to <PERSON>", "person talks to person"),
        ("a  b\t\tc \n d", "a b c d"),
        ("a\tb\nc", "a\tb\nc"),  # single ones stay, as released
        ("  a b \n", "a b"),
        ("a \n\n", "a"),
        ("a\n", "a"),
        ("\na", "\na"),
        ("a - b", "a b"),
        ("", ""),
        (" .,!? ", ""),
        ("ÉTÉ à la plage", "été à la plage"),
        ("a dog 🐶👍🏽 & a cat_2 [x] {y} @z", "a dog 🐶👍🏽 & a cat_2 [x] {y} @z"),
        ("犬が走る。", "犬が走る。"),
    ],
)
def test_clean(text, expected):
    assert clean_text(text) == expected


@given(st.text(alphabet=st.sampled_from("aB ,.'!?\"()*#:;~-/<>person\n\t🐶"), max_size=60))
def test_clean_follows_the_stated_steps(text):
    expected = re.sub("[" + re.escape(",.'!?\"()*#:;~") + "]", "", text.lower())
    expected = expected.replace("-", " ").replace("/", " ").replace("<person>", "person")
    expected = re.sub(r"\s\s+", " ", expected).rstrip("\n").strip(" ")
    assert clean_text(text) == expected


def test_words_are_counted_after_cleaning():
    assert clean_text("One, two - three four", max_words=3) == "one two three"
    assert clean_text("one two", max_words=3) == "one two"
    assert clean_text("one two three", max_words=3) == "one two three"


def test_ten_thousand_words():
    text = "The Quick, brown fox-trot! 🦊 " * 2500
    cleaned = clean_text(text)
    assert len(cleaned.split(" ")) == 15000
    assert cleaned.startswith("the quick brown fox trot 🦊 the")
    assert len(clean_text(text, max_words=40).split(" ")) == 40


def test_what_is_no_text_is_refused():
    with pytest.raises(DataError, match="a caption must be text, is list: "):
        clean_text(["a", "b"])
    with pytest.raises(DataError, match="is NoneType"):
        clean_text(None)


def test_action_templates():
    forms = captions.templates("action")
    texts = [clean_text(captions.format_prompt(form, "Playing Guitar")) for form in forms]
    assert len(set(texts)) == 16
    assert texts[0] == "a photo of action playing guitar"
    assert texts[7] == "playing guitar"
    assert texts[11] == "can you recognize the action of playing guitar"
    assert texts[15] == "the woman is playing guitar"
    assert captions.templates("the {}") == ("the {}",)


def test_braces_of_a_text_mean_nothing():
    assert captions.format_prompt("a video of {}.", "{0} {x}") == "a video of {0} {x}."


def test_templates_from_a_file(tmp_path):
    path = tmp_path / "forms.txt"
    path.write_text("a bad photo of {}\n\n {} 🐶\n", encoding="utf-8")
    forms = captions.templates(f"file:{path}")
    assert forms == ("a bad photo of {}", " {} 🐶")
    path.write_text("a\n")
    with pytest.raises(ConfigError, match=r"template 1 has no '{}': 'a'"):
        captions.templates(f"file:{path}")
    path.write_text("")
    with pytest.raises(ConfigError, match="has no templates"):
        captions.templates(f"file:{path}")
    with pytest.raises(ConfigError, match="cannot be read"):
        captions.templates(f"file:{tmp_path / 'none.txt'}")


def test_unknown_prompts():
    with pytest.raises(ConfigError, match=r"prompt 'actions' is not known.*'action'"):
        captions.templates("actions")
    with pytest.raises(ConfigError, match="file:PATH"):
        captions.templates("imagenet")


@pytest.mark.parametrize(
    "text",
    [
        "Turn left here",
        "pushing something from RIGHT to left",
        "a right-handed man",
        "moving leftwards",
        "the leftmost cup",
        "spins counter-clockwise",
        "rotating anticlockwise",
        "clockwise",
        "right.",
    ],
)
def test_sides_are_noticed(text):
    assert mentions_side(text)


@pytest.mark.parametrize(
    "text", ["", "a bright copyright", "leftover food", "a man walks", "righteous"]
)
def test_other_words_are_not_sides(text):
    assert not mentions_side(text)


def test_import_is_light():
    code = "import sys, iv2_jax.data.captions; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
