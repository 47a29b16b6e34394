"""Captions as queries: several a clip, equal ones of several clips, odd characters."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from iv2_jax.data.corpora import open_data
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.modalities import CorpusConfig, TextConfig
from iv2_jax.errors import ConfigError, DataError
from iv2_jax.eval import retrieval_texts
from tests.data.clips import write_manifest
from tests.eval import two_towers


def test_equal_texts_are_one_and_right_for_all_their_clips():
    texts = [("a", "b"), ("b",), ("a", "a")]
    found = retrieval_texts.text_set(texts)
    assert found.texts == ("a", "b")
    np.testing.assert_array_equal(found.relevant, [[1, 1], [0, 1], [1, 0]])
    np.testing.assert_array_equal(found.counts, [3, 2])


def test_the_released_ground_truth_keeps_copies_apart():
    found = retrieval_texts.text_set([("a", "b"), ("b",)], same_text_relevant=False)
    assert found.texts == ("a", "b", "b")
    np.testing.assert_array_equal(found.relevant, [[1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(found.counts, [1, 1, 1])


def test_cleaning_follows_the_config():
    hard = "  A 🔥 Dog-house,\n\tit's   <person>!  "
    assert retrieval_texts.clean(hard, TextConfig()) == "a 🔥 dog house its person"
    assert retrieval_texts.clean(hard, TextConfig(max_words=2)) == "a 🔥"
    assert retrieval_texts.clean(hard, TextConfig(clean=False, max_words=3)) == "A 🔥 Dog-house,"
    assert retrieval_texts.clean("?!", TextConfig()) == ""


def test_which_caption_asks():
    config = TextConfig(captions=("video", "audio"))
    assert retrieval_texts.choose_caption(config, "") == "video"
    assert retrieval_texts.choose_caption(config, "audio") == "audio"
    with pytest.raises(ConfigError, match="did you mean 'audio'"):
        retrieval_texts.choose_caption(config, "audo")


def test_lists_may_name_and_choose_captions_their_own_way(tmp_path):
    for name, captions in (("one", {"video": ["A b", "c"]}), ("two", {"avs": ["D", "e f"]})):
        write_manifest(tmp_path / f"{name}.jsonl", [{"path": f"{name}.mp4", "captions": captions}])
    text = two_towers.text_config(tmp_path, max_length=4)
    two_towers.write_set(tmp_path, captions=())  # the vocabulary
    data = DataConfig(
        corpora=(
            CorpusConfig(str(tmp_path / "one.jsonl")),
            CorpusConfig(str(tmp_path / "two.jsonl"), captions={"video": "avs"}, choice="join"),
        ),
        text=text,
    )
    found = retrieval_texts.clip_texts(open_data(data), "video", text)
    assert found == [("a b", "c"), ("d e f",)]
    with pytest.raises(DataError, match="no clip has a caption 'speech'"):
        retrieval_texts.clip_texts(
            open_data(data), "speech", dataclasses.replace(text, captions=("speech",))
        )
