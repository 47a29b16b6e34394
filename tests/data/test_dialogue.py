"""Templates written out, rows of sequences, and what the bridge is told (spec stage3 4 and 5)."""

from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.data import dialogue as dlg
from iv2_jax.data import prompts
from iv2_jax.data.dialogue import IGNORE
from iv2_jax.data.instruct.batches import bridge_text
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn
from iv2_jax.data.instruct.sequence import SequenceBuilder, SequenceConfig
from iv2_jax.data.prompts import BridgeText
from iv2_jax.errors import ConfigError, DataError
from tests.data.instruct.words import Letters

VIDEO, IMAGE = Medium("video", "a.mp4"), Medium("image", "a.jpg")
HISTORY = Conversation(
    (Turn("Hi?", "Yes.", "Watch. "), Turn("What is she wearing?", None)), (VIDEO,), message=" One. "
)
TRAINING = Conversation((Turn("a b", "c d", "x y"), Turn("e", "f")), (VIDEO,))
# Templates whose answers end with another token than `</s>`.
ENDS = {"phi3": 100 + ord("\n"), "chatml": Letters.MARKS.index("<|im_end|>")}


def _build(conversation, template="mistral_v3", views=None, **options):
    tokenizer = Letters()
    tokenizer.eos_id = ENDS.get(template, 2)
    options = {"tokens_per_view": 3} | options
    return SequenceBuilder(SequenceConfig(template, **options), tokenizer).build(
        conversation, views
    )


def _written(conversation, template="mistral_v3", views=None, wanted=None, **options):
    """The conversation as one string, `#` for each view's visual tokens; without the first <s>."""
    built = _build(conversation, template, views, tokens_per_view=1, **options)
    shown = [
        "#" if index >= 0 else Letters().decode([token])
        for token, index in zip(built.tokens, built.visual_index, strict=True)
    ]
    chosen = range(len(shown)) if wanted is None else np.flatnonzero(built.targets != IGNORE)
    return "".join(shown[i] for i in chosen).removeprefix("<s>")


def _only(question, *media):
    return Conversation((Turn(question, None),), media)


def test_released_chat_prompt_byte_for_byte():
    assert _written(HISTORY) == (
        "Watch. [INST] <Video>#</Video> One.[/INST]"
        " [INST] Hi? [/INST]Yes.</s> [INST] What is she wearing? [/INST]"
    )
    assert _written(_only("What?", IMAGE)) == "[INST] <Image>#</Image>[/INST] [INST] What? [/INST]"


def test_views_have_a_pair_of_tags_each_or_share_one():
    views = _only("q", VIDEO)
    assert _written(views, views=[3]).count("<Video>#</Video>") == 3
    v2 = _written(views, "mistral_v2", [3])
    assert v2 == "[INST] <Video>###</Video> [/INST] [INST] q [/INST]"


def test_other_templates():
    assert _written(TRAINING, "internlm2_5") == (
        "<|im_start|>system\nx y<|im_end|>\n<|im_start|>user\n<vid>#</vid><|im_end|>\n"
        "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nc d<|im_end|>\n</s>"
        "<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\nf<|im_end|>\n</s>"
    )
    assert _written(TRAINING, "phi3") == (
        "x y<|user|>\n<Video>#</Video>\na b<|end|>\n<|assistant|>\nc d<|end|>\n"
        "<|user|>\ne<|end|>\n<|assistant|>\nf<|end|>\n"
    )
    assert _written(TRAINING, "chatml") == (
        "<|im_start|>system\nx y<|im_end|>\n<|im_start|>user\n<Video>#</Video>\na b<|im_end|>\n"
        "<|im_start|>assistant\nc d<|im_end|>\n<|im_start|>user\ne<|im_end|>\n"
        "<|im_start|>assistant\nf<|im_end|>"
    )
    tuning = _written(TRAINING, "mistral_v3_tuning")
    assert tuning.startswith("x y[INST] <Video>#</Video>[/INST] [INST] a b [/INST] c d</s>")
    spaced = _written(TRAINING, "mistral_v2")
    assert spaced == (
        "x y [INST] <Video>#</Video> [/INST] [INST] a b [/INST]c d </s>[INST] e [/INST]f </s>"
    )  # pieces without the spaces around them, which the tokenizer puts there itself
    text_only = Conversation((Turn("q", "a"),))
    assert _written(text_only) == "[INST] [/INST] [INST] q [/INST]a</s>"
    assert _written(text_only, "chatml") == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        "a<|im_end|>"
    )


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("mistral_v3_caption", "[INST] <Video>#</Video> [/INST] a dog</s>"),
        ("mistral_v3", "[INST] <Video>#</Video>[/INST]a dog</s>"),
        ("phi3", "<|user|>\n<Video>#</Video>\n<|end|>\n<|assistant|>\na dog<|end|>\n"),
    ],
)
def test_captions_answer_no_question(template, written):
    caption = Conversation((Turn("", "a dog"),), (VIDEO,))
    assert _written(caption, template) == written
    ended = {"phi3": "a dog<|end|>\n"}.get(template, "a dog</s>")
    assert _written(caption, template, wanted=True) == ended


@pytest.mark.parametrize("template", prompts.TEMPLATES)
def test_targets_of_every_template_are_its_answers(template):
    answers = [prompts.get_template(template).answer.format(answer=a) for a in ("c d", "f")]
    if prompts.get_template(template).strip:
        answers = [answer.strip() for answer in answers]
    assert _written(TRAINING, template, wanted=True) == "".join(answers)


def test_frames_sentence():
    assert prompts.frames_message([0.04, 1.25, 3]) == (
        " The video contains 3 frames sampled at 0.0, 1.2, 3.0 seconds. "
    )


@pytest.mark.parametrize(
    ("compat", "places"), [("released_chat", [0, 14, 33]), ("none", [0]), ("released_tuning", [])]
)
def test_where_the_beginning_token_goes(compat, places):
    out = _build(Conversation((Turn("q", None, "x"),), (VIDEO,)), views=[2], compat=compat)
    assert np.flatnonzero((out.tokens == 1) & (out.visual_index < 0)).tolist() == places


def test_rows_are_padded_and_cut():
    out = _build(TRAINING)
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
    out = _build(TRAINING)
    with pytest.raises(DataError, match="example 0 has 3 visual tokens"):
        dlg.pad_batch([out], 15, pad_id=0)
    with pytest.raises(DataError, match="prompt 0 has"):
        dlg.pad_batch([out], out.length - 1, pad_id=0, left=True)


def test_buckets():
    out = _build(TRAINING)
    assert dlg.bucket_length([out], (8, out.length, 99)) == out.length
    assert dlg.bucket_length([out], (8, 9)) == 9


def test_text_for_the_bridge():
    assert bridge_text(TRAINING, BridgeText.NONE) is None
    assert bridge_text(TRAINING, BridgeText.INSTRUCTION) == "x y"
    assert bridge_text(TRAINING, BridgeText.INSTRUCTION_AND_QUESTION) == "x y a b"
    assert bridge_text(Conversation((Turn("q", "a"),)), BridgeText.INSTRUCTION) == ""


def test_an_unknown_template_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'mistral_v3'"):
        prompts.get_template("mistral_v4")
