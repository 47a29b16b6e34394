"""Starting from Google's BERT: what is taken, what is copied, what stays fresh, what is refused."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from iv2_jax.errors import CheckpointError
from iv2_jax.interop import torch_keys
from iv2_jax.interop.text_recipes import from_released_bert
from iv2_jax.interop.torch_keys.chat import bridge_map
from iv2_jax.interop.torch_keys.text import bert_map
from iv2_jax.models.bridge import BridgeConfig
from iv2_jax.models.text.bert import ZOO
from tests.interop.family_cases import random_tree

TARGET = ZOO["test_tiny_bert"]
# Google's: no fusion layers, and heads of its own.
GOOGLES = dataclasses.replace(TARGET, fusion_layer=TARGET.depth)
BRIDGE = BridgeConfig(
    context_width=24,
    llm_width=32,
    num_queries=3,
    num_extra_queries=2,
    width=TARGET.width,
    depth=TARGET.depth,
    num_heads=TARGET.num_heads,
    mlp_width=TARGET.mlp_width,
    vocab_size=TARGET.vocab_size + 1,
    max_length=TARGET.max_length,
)


@pytest.fixture
def released():
    entries = bert_map(GOOGLES)
    tensors = torch_keys.to_torch(random_tree(entries, 0), entries)
    return tensors | {
        "bert.pooler.dense.weight": np.zeros((2, 2), np.float32),
        "cls.seq_relationship.bias": np.zeros(2, np.float32),
    }


def _torch(params, entries):
    return torch_keys.to_torch(params, entries)


@pytest.mark.parametrize("mlm_head", [True, False])
def test_stage2_takes_everything_but_cross_attention(released, mlm_head):
    entries = bert_map(dataclasses.replace(TARGET, mlm_head=mlm_head))
    fresh = random_tree(entries, 1)
    got = _torch(from_released_bert(released, entries, fresh), entries)
    own = _torch(fresh, entries)
    taken = 0
    for key, value in got.items():
        name = key if mlm_head else f"bert.{key}"
        is_fresh = "crossattention" in key
        np.testing.assert_array_equal(value, own[key] if is_fresh else released[name])
        taken += not is_fresh
    lost = 0 if mlm_head else len([key for key in released if key.startswith("cls.predictions")])
    assert taken == len(released) - 2 - lost


def test_old_names_and_no_prefix(released):
    entries = bert_map(TARGET)
    fresh = random_tree(entries, 1)
    old = {
        key.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in released.items()
        if "decoder" not in key
    }
    assert any(key.endswith("gamma") for key in old)
    jax.tree.map(
        np.testing.assert_array_equal,
        from_released_bert(old, entries, fresh),
        from_released_bert(released, entries, fresh),
    )


def test_q_former_copies_the_feed_forward_and_keeps_its_own_parts(released):
    entries = bridge_map(BRIDGE)
    fresh = random_tree(entries, 1)
    got, own = (_torch(p, entries) for p in (from_released_bert(released, entries, fresh), fresh))
    layer = "bert.encoder.layer.1"
    for part in ("intermediate", "output"):
        value = released[f"{layer}.{part}.dense.weight"]
        np.testing.assert_array_equal(got[f"qformer.{layer}.{part}.dense.weight"], value)
        np.testing.assert_array_equal(got[f"qformer.{layer}.{part}_query.dense.weight"], value)
    words = got["qformer.bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(words[:-1], released["bert.embeddings.word_embeddings.weight"])
    for key in (
        "query_tokens",
        "extra_query_tokens",
        "vision_layernorm.weight",
        "mistral_proj.weight",
        "qformer.bert.encoder.layer.0.crossattention.self.key.weight",
    ):
        np.testing.assert_array_equal(got[key], own[key])
    np.testing.assert_array_equal(
        words[-1], own["qformer.bert.embeddings.word_embeddings.weight"][-1]
    )


def test_misfits_are_listed(released):
    entries = bert_map(TARGET)
    fresh = random_tree(entries, 1)
    short = {key: value for key, value in released.items() if ".layer.2." not in key}
    with pytest.raises(CheckpointError, match=r"file\.bin does not fit the model:\n +16 missing"):
        from_released_bert(short, entries, fresh, source="file.bin")
    deep = released | {"bert.encoder.layer.3.output.dense.bias": np.zeros(TARGET.width)}
    with pytest.raises(CheckpointError, match=r"1 unexpected:\n +encoder\.layer\.3"):
        from_released_bert(deep, entries, fresh)
    wide = bert_map(dataclasses.replace(TARGET, width=64))
    with pytest.raises(CheckpointError, match="model of another size"):
        from_released_bert(released, wide, random_tree(wide, 1))
    with pytest.raises(CheckpointError, match="fresh parameters lack head/bias"):
        from_released_bert(released, entries, {k: v for k, v in fresh.items() if k != "head"})
