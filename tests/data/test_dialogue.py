"""Prompts, slots, targets and padding of dialogues (spec stage3 4 and 5)."""

from __future__ import annotations

import re

import numpy as np
import pytest

from iv2_jax.data import dialogue as dlg
from iv2_jax.data import prompts
from iv2_jax.data.dialogue import IGNORE, Bos
from iv2_jax.data.prompts import Dialogue, Turn
from iv2_jax.errors import ConfigError, DataError

V3 = prompts.get_template("mistral_v3")
HISTORY = Dialogue(
    turns=(Turn("Hi?", "Yes."), Turn("What is she wearing?")),
    instruction="Watch. ",
    message=" One.  ",
)
TRAINING = Dialogue(turns=(Turn("a b", "c d"), Turn("e", "f")), instruction="x y")


class Words:
    """A tokenizer of words and marks; special marks are tokens of their own."""

    specials = ("</s>", "[INST]", "[/INST]", "<|im_end|>", "<|end|>")

    def __init__(self):
        self.ids = {"<s>": 1, "</s>": 2}
        self.calls = []

    def __call__(self, text):
        self.calls.append(text)
        words = re.findall(r"\[/?INST\]|</?\w+>|<\|\w+\|>|[^\s<\[]+", text)
        return [self.ids.setdefault(word, len(self.ids) + 1) for word in words]

    def text(self, ids):
        names = {v: k for k, v in self.ids.items()}
        return " ".join(names[i] for i in ids)


def _vocabulary(encode):
    return dlg.Vocabulary(encode, bos_id=1, eos_id=2, pad_id=0)


def _assemble(dialogue, template=V3, encode=None, **options):
    options = {"tokens_per_view": 3} | options
    encode = encode or Words()
    return dlg.assemble(
        prompts.pieces(dialogue, template), template, _vocabulary(encode), **options
    )


def test_released_chat_prompt_byte_for_byte():
    assert prompts.render(HISTORY, V3, slot="#") == (
        "Watch. [INST] <Video>#</Video> One.[/INST]"
        " [INST] Hi? [/INST]Yes.</s> [INST] What is she wearing? [/INST]"
    )
    image = Dialogue(turns=(Turn("What?"),), media="image")
    assert (
        prompts.render(image, V3, slot="#") == "[INST] <Image>#</Image>[/INST] [INST] What? [/INST]"
    )


def test_views_have_a_pair_of_tags_each_or_share_one():
    views = Dialogue(turns=(Turn("q"),), num_views=3)
    assert prompts.render(views, V3, slot="#").count("<Video>#</Video>") == 3
    v2 = prompts.render(views, prompts.get_template("mistral_v2"), slot="#")
    assert v2 == "[INST] <Video>###</Video> [/INST] [INST] q [/INST]"


def test_other_templates():
    text = prompts.render(TRAINING, prompts.get_template("internlm2_5"), slot="#")
    assert text == (
        "<|im_start|>system\nx y<|im_end|>\n<|im_start|>user\n<vid>#</vid><|im_end|>\n"
        "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nc d<|im_end|>\n</s>"
        "<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\nf<|im_end|>\n</s>"
    )
    assert prompts.render(TRAINING, prompts.get_template("phi3"), slot="#") == (
        "x y<|user|>\n<Video>#</Video>\na b<|end|>\n<|assistant|>\nc d<|end|>\n"
        "<|user|>\ne<|end|>\n<|assistant|>\nf<|end|>\n"
    )
    caption = Dialogue(turns=(Turn("", "a dog"),))
    assert prompts.render(caption, prompts.get_template("mistral_v3_caption"), slot="#") == (
        "<s>[INST] <Video>#</Video> [/INST] a dog</s>"
    )
    tuning = prompts.render(TRAINING, prompts.get_template("mistral_v3_tuning"), slot="#")
    assert tuning.startswith("x y[INST] <Video>#</Video>[/INST] [INST] a b [/INST] c d</s>")
    text_only = Dialogue(turns=(Turn("q", "a"),), media="none")
    assert prompts.render(text_only, V3) == "[INST] [/INST] [INST] q [/INST]a</s>"


def test_frames_sentence():
    assert prompts.frames_message([0.04, 1.25, 3]) == (
        " The video contains 3 frames sampled at 0.0, 1.2, 3.0 seconds. "
    )


def test_a_prompt_is_encoded_segment_by_segment():
    words = Words()
    _assemble(HISTORY, encode=words, train=False)
    assert words.calls == [
        "Watch. [INST] <Video>",
        "</Video> One.[/INST] [INST] Hi? [/INST]Yes.</s> [INST] What is she wearing? [/INST]",
    ]


@pytest.mark.parametrize(
    ("bos", "places"), [(Bos.EVERY_SEGMENT, [0, 7, 13]), (Bos.FIRST, [0]), (Bos.NONE, [])]
)
def test_where_the_beginning_token_goes(bos, places):
    views = Dialogue(turns=(Turn("q"),), instruction="x", num_views=2)
    out = _assemble(views, bos=bos, train=False)
    assert np.flatnonzero((out.tokens == 1) & (out.visual_index < 0)).tolist() == places


def test_every_answer_is_a_target_and_nothing_else():
    words = Words()
    out = _assemble(TRAINING, encode=words)
    wanted = out.targets != IGNORE
    np.testing.assert_array_equal(out.targets[wanted], out.tokens[wanted])
    assert words.text(out.targets[wanted]) == "c d </s> f </s>"
    assert out.visual_index[out.visual_index >= 0].tolist() == [0, 1, 2]
    assert not wanted[out.visual_index >= 0].any()
    caption = _assemble(Dialogue(turns=(Turn("", "c d"),)), encode=words)
    assert words.text(caption.targets[caption.targets != IGNORE]) == "c d </s>"
    prompt = _assemble(TRAINING, encode=words, train=False)
    assert (prompt.targets == IGNORE).all()
    np.testing.assert_array_equal(prompt.tokens, out.tokens)


def test_visual_rows_of_views_follow_each_other():
    out = _assemble(Dialogue(turns=(Turn("q", "a"),), num_views=3))
    assert out.visual_index[out.visual_index >= 0].tolist() == list(range(9))


def test_an_answer_prefix_ends_the_prompt():
    words = Words()
    parts = prompts.pieces(HISTORY, V3, "Best option:(")
    out = dlg.assemble(parts, V3, _vocabulary(words), tokens_per_view=1, train=False)
    assert words.text(out.tokens[-3:]) == "[/INST] Best option:("


def test_a_tokenizer_that_splits_the_stop_mark_is_refused():
    with pytest.raises(DataError, match=r"end of the answer 'c d</s>', not\s+eos_id=2"):
        _assemble(TRAINING, encode=lambda text: [ord(c) for c in text])


def test_rows_are_padded_and_cut():
    out = _assemble(TRAINING)
    batch = dlg.pad_batch([out, out], out.length + 2, pad_id=9)
    assert batch["tokens"][0, -2:].tolist() == [9, 9]
    assert batch["targets"][0, -2:].tolist() == [IGNORE, IGNORE]
    assert batch["visual_index"][0, -2:].tolist() == [-1, -1]
    assert batch["mask"].sum(1).tolist() == [out.length, out.length]
    np.testing.assert_array_equal(batch["targets"][1, :-2], out.targets)
    cut = dlg.pad_batch([out], out.length - 1, pad_id=9)
    np.testing.assert_array_equal(cut["tokens"][0], out.tokens[:-1])
    left = dlg.pad_batch([out], out.length + 2, pad_id=9, left=True)
    np.testing.assert_array_equal(left["tokens"][0, 2:], out.tokens)
    assert left["mask"][0, :3].tolist() == [False, False, True]


def test_rows_too_short_are_refused():
    out = _assemble(TRAINING)
    with pytest.raises(DataError, match="example 0 has 3 visual tokens"):
        dlg.pad_batch([out], 5, pad_id=0)
    with pytest.raises(DataError, match="prompt 0 has"):
        dlg.pad_batch([out], out.length - 1, pad_id=0, left=True)


def test_buckets():
    out = _assemble(TRAINING)
    assert dlg.bucket_length([out], (8, out.length, 99)) == out.length
    assert dlg.bucket_length([out], (8, 9)) == 9


def test_text_for_the_bridge():
    assert prompts.bridge_text(TRAINING, prompts.BridgeText.NONE) is None
    assert prompts.bridge_text(TRAINING, prompts.BridgeText.INSTRUCTION) == "x y"
    assert prompts.bridge_text(TRAINING, prompts.BridgeText.INSTRUCTION_AND_QUESTION) == "x y a b"
    empty = Dialogue(turns=(Turn("q", "a"),))
    assert prompts.bridge_text(empty, prompts.BridgeText.INSTRUCTION) == ""


def test_dialogues_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'mistral_v3'"):
        prompts.get_template("mistral_v4")
    with pytest.raises(ConfigError, match="media='sound'"):
        Dialogue(turns=(Turn("q"),), media="sound")
    with pytest.raises(DataError, match="at least one turn"):
        Dialogue(turns=())
    with pytest.raises(DataError, match="only the last turn"):
        Dialogue(turns=(Turn("q"), Turn("r", "a")))
    with pytest.raises(ConfigError, match="num_views=0"):
        Dialogue(turns=(Turn("q"),), num_views=0)
