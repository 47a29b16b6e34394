"""What a chat model starts from: encoders, language models and bridges of other origins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flax import traverse_util

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import chat_towers, families
from iv2_jax.interop.run_config import bare_student
from iv2_jax.interop.sources import WeightSource, as_tensors
from iv2_jax.interop.torch_keys.text import bert_map
from iv2_jax.models import kinds, zoo
from iv2_jax.models.text.bert import BertConfig
from iv2_jax.train.init_towers import TowerInit, assemble
from tests.train import tiny_instruct as tiny

CHAT = tiny.model()


def _params(config, seed=0):
    return tiny.draw(kinds.of(config).abstract_params(config), seed)


def _flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def _source(config, params, *, known=True):
    tensors = as_tensors(params, families.of(config).entries(config))
    return WeightSource(Path("x"), tensors, config if known else None)


@pytest.mark.parametrize("known", [True, False])
def test_encoder_of_a_student_with_one_block_more(known):
    """A pool, a last block and frames of its own: cut, and positions fitted."""
    encoder = dataclasses.replace(
        CHAT.encoder, depth=3, pool=True, num_frames=4, image_positions="none"
    )
    student = bare_student(encoder)
    params = _params(student)
    taken = chat_towers.vision(_source(student, params, known=known), CHAT)
    want = _flat(_params(CHAT)["encoder"])
    assert set(taken.params) == {f"encoder/{p}" for p in want if p != "img_pos_embed"}
    assert taken.fresh == {"encoder/img_pos_embed": "the source has none"}
    kernel = params["encoder"]["blocks"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(taken.params["encoder/blocks/attn/qkv/kernel"], kernel[:2])
    assert taken.params["encoder/pos_embed"].shape == want["pos_embed"].shape
    assert "blocks from 2 on left out" in taken.notes


def test_encoder_of_another_width_is_refused():
    student = bare_student(dataclasses.replace(CHAT.encoder, depth=1))
    with pytest.raises(ConfigError, match=r"has 1 blocks, chat\.encoder\.depth is 2"):
        chat_towers.vision(_source(student, _params(student)), CHAT)
    with pytest.raises(CheckpointError, match=r"blocks\.1"):
        chat_towers.vision(_source(student, _params(student), known=False), CHAT)


def test_parts_of_a_chat_model_and_the_whole():
    """Adapters that it has not stay fresh."""
    params = _params(CHAT)
    lora = tiny.model(lora=0.0)
    for name, recipe in (("llm", chat_towers.llm_of_chat), ("bridge", chat_towers.bridge)):
        taken = recipe(_source(CHAT, params), lora)
        want = _flat({name: params[name]})
        assert set(taken.params) == set(want)
        for path, value in taken.params.items():
            np.testing.assert_array_equal(value, want[path])
        assert bool(taken.fresh) == (name == "llm")
    whole = chat_towers.whole_chat(_source(CHAT, params, known=False), lora)
    assert set(whole.params) == set(_flat(params))
    assert all("/lora_" in path for path in whole.fresh)
    with pytest.raises(ConfigError, match=r"has adapters and chat\.llm none"):
        chat_towers.whole_chat(_source(lora, _params(lora)), CHAT)
    other = dataclasses.replace(CHAT, llm=dataclasses.replace(CHAT.llm, vocab_size=300))
    with pytest.raises(ConfigError, match=r"vocab_size is 261, chat\.llm has 300"):
        chat_towers.llm_of_chat(_source(CHAT, params), other)


def test_bridge_in_berts_layout():
    """The queries' feed-forward starts as the text's; what BERT has not stays fresh."""
    c = CHAT.bridge
    bert = BertConfig(
        vocab_size=c.vocab_size,
        width=c.width,
        num_heads=c.num_heads,
        mlp_width=c.mlp_width,
        max_length=c.max_length,
        context_width=c.width,
        depth=c.depth,
        fusion_layer=c.depth,
        mlm_head=False,
    )
    tensors = as_tensors(_params(bert), bert_map(bert))
    taken = chat_towers.bridge(WeightSource(Path("bert"), tensors), CHAT)
    assert {p.split("/")[1] for p in taken.fresh} >= {"query_tokens", "project_up", "vision_norm"}
    group = "bridge/groups/layer_0"
    np.testing.assert_array_equal(
        taken.params[f"{group}/mlp_query/fc1/kernel"], taken.params[f"{group}/mlp/fc1/kernel"]
    )
    assert any("cross" in path for path in taken.fresh)
    assert not any("cross" in path for path in taken.params)


def test_language_model_out_of_a_file(shared_dir):
    path = str(shared_dir / "data/models/stories260K.bin")
    chat = zoo.get("test_tiny_chat")
    with pytest.raises(ConfigError, match=r"decoder\.width is 64"):
        assemble([TowerInit("llm", path)], chat)
    from iv2_jax.interop.hf_llm import load_llm

    llm, params = load_llm(path)
    bridge = dataclasses.replace(chat.bridge, llm_width=llm.decoder.width)
    filled = assemble([TowerInit("llm", path)], dataclasses.replace(chat, llm=llm, bridge=bridge))
    have, want = _flat(filled.params), _flat({"llm": params})
    assert set(have) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(have[name], value)
    with pytest.raises(ConfigError, match="no tower 'text'"):
        assemble([TowerInit("text", path)], chat)
