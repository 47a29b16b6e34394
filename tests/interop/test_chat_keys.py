"""The chat models' key maps: the original's names and shapes, and exact inverses."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import CheckpointError
from iv2_jax.interop import torch_keys
from iv2_jax.interop.entries import parameters
from iv2_jax.interop.torch_keys import chat as chat_keys
from iv2_jax.interop.torch_keys.chat import bridge_map, chat_map
from iv2_jax.models import bridge as bridge_lib
from iv2_jax.models import chat as chat_lib
from iv2_jax.models import zoo
from iv2_jax.models.lora import LoraConfig
from tests.interop.family_cases import random_tree

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests" / "chat"

BRIDGES = {
    "chat_bridge_qformer_internvideo2_1b": "bridge_internvideo2_chat",
    "chat_bridge_videochat2_mistral_stage2": "bridge_videochat2_align",
    "chat_bridge_videochat2_mistral_stage3": "bridge_videochat2",
}
CHATS = {
    "chat_internvideo2_chat_8b": "internvideo2_chat_8b",
    "chat_internvideo2_chat_8b_internlm2_5": "internvideo2_chat_8b_internlm2_5",
    "chat_internvideo2_chat_8b_merged_lora": "internvideo2_chat_8b_merged",
}
TINY = chat_lib.ZOO["test_tiny_chat"]
TINY_LORA = dataclasses.replace(TINY, llm=TINY.llm.with_lora(LoraConfig(3, 6.0), head=True))


def _manifest(name):
    """`{key: shape}` of a manifest."""
    content = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, (shape, _) in content.items()}


def test_every_manifest_is_tested():
    files = {path.name.removesuffix(".json.gz") for path in MANIFESTS.glob("*.json.gz")}
    assert files == BRIDGES.keys() | CHATS.keys()


@pytest.mark.parametrize("name", [*BRIDGES, *CHATS])
def test_keys_and_shapes_are_the_originals(name):
    if name in BRIDGES:
        entries = bridge_map(bridge_lib.ZOO[BRIDGES[name]])
    else:
        entries = chat_map(chat_lib.ZOO[CHATS[name]])
    manifest = _manifest(name)
    assert torch_keys.torch_shapes(entries) == manifest
    # And back: a file of such tensors is read whole, and gives the tree of the model.
    tensors = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in manifest.items()}
    assert torch_keys.from_torch(tensors, entries) == torch_keys.abstract_params(entries)


def test_parameter_counts():
    """Spec stage3 9; its counts hold the 512 position ids, which are no parameters."""
    entries = parameters(chat_map(chat_lib.ZOO["internvideo2_chat_8b"]))
    sizes = {entry.path: math.prod(entry.shape) for entry in entries}
    lora = sum(size for path, size in sizes.items() if "/lora_" in path)
    encoder = sum(size for path, size in sizes.items() if path.startswith("encoder/"))
    llm = sum(size for path, size in sizes.items() if path.startswith("llm/")) - lora
    assert lora == 42_532_864
    assert encoder == 988_779_520
    assert llm == 7_248_023_552
    assert sum(sizes.values()) == 8_471_369_472 - 512
    bridge = parameters(bridge_map(bridge_lib.ZOO["bridge_internvideo2_chat"]))
    assert sum(math.prod(entry.shape) for entry in bridge) == 192_033_536 - 512


def _shapes(tree):
    flat = traverse_util.flatten_dict(meta.unbox(tree), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


@pytest.mark.parametrize("name", sorted({**bridge_lib.ZOO, **chat_lib.ZOO}))
def test_paths_and_shapes_are_our_models(name):
    is_bridge = name in bridge_lib.ZOO
    config = (bridge_lib.ZOO if is_bridge else chat_lib.ZOO)[name]
    entries = (bridge_map if is_bridge else chat_map)(config)
    assert _shapes(zoo.abstract_params(config)) == _shapes(torch_keys.abstract_params(entries))


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param(chat_map(TINY), id="chat"),
        pytest.param(chat_map(TINY_LORA), id="old peft names"),
        pytest.param(chat_map(TINY_LORA, peft="new"), id="new peft names"),
        pytest.param(
            bridge_map(dataclasses.replace(TINY.bridge, text=False, cross_every=1)), id="no text"
        ),
        pytest.param(bridge_map(dataclasses.replace(TINY.bridge, cross_every=4)), id="tail alone"),
        pytest.param(
            bridge_map(dataclasses.replace(TINY.bridge, depth=5, cross_every=3)), id="long tail"
        ),
    ],
)
def test_round_trip_is_the_identity(entries):
    params = random_tree(entries)
    tensors = torch_keys.to_torch(params, entries)
    assert {key: np.shape(value) for key, value in tensors.items()} == (
        torch_keys.torch_shapes(entries)
    )
    back = torch_keys.from_torch(tensors, entries)
    jax.tree.map(np.testing.assert_array_equal, params, back)
    again = torch_keys.to_torch(back, entries)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor)


def test_layers_keep_their_numbers():
    config = dataclasses.replace(TINY.bridge, depth=5)
    entries = bridge_map(config)
    params = random_tree(entries)
    tensors = torch_keys.to_torch(params, entries)
    layer = "qformer.bert.encoder.layer"
    groups, tail = params["groups"], params["tail"]
    for number, bias in (
        (0, groups["layer_0"]["mlp"]["fc1"]["bias"][0]),
        (1, groups["layer_1"]["mlp"]["fc1"]["bias"][0]),
        (2, groups["layer_0"]["mlp"]["fc1"]["bias"][1]),
        (3, groups["layer_1"]["mlp"]["fc1"]["bias"][1]),
        (4, tail["layer_0"]["mlp"]["fc1"]["bias"]),
    ):
        np.testing.assert_array_equal(tensors[f"{layer}.{number}.intermediate.dense.bias"], bias)
    crossing = {key.split(".")[4] for key in tensors if "crossattention" in key}
    assert crossing == {"0", "2", "4"}
    assert tensors["qformer.bert.embeddings.position_ids"].dtype == np.int64


def test_other_names_of_the_original():
    keys = torch_keys.torch_shapes(bridge_map(TINY.bridge, projection="llama_proj"))
    assert "llama_proj.weight" in keys
    config = dataclasses.replace(
        TINY, encoder=None, bridge=dataclasses.replace(TINY.bridge, project_down=False)
    )
    keys = torch_keys.torch_shapes(chat_map(config))
    assert "mistral_proj.weight" in keys
    assert "mistral_model.model.embed_tokens.weight" in keys
    assert not any(key.startswith("vision_encoder.") for key in keys)


def test_only_what_carries_nothing_is_left_out():
    entries = chat_map(TINY)
    params = random_tree(entries)
    tensors = torch_keys.to_torch(params, entries)
    extra = {
        "qformer.cls.predictions.bias": np.zeros(3),
        "lm.model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2),
        "itm_head.weight": np.zeros(2),
        "temp": np.zeros(()),
    }
    back = torch_keys.from_torch(tensors | extra, entries, ignore=chat_keys.IGNORABLE)
    jax.tree.map(np.testing.assert_array_equal, params, back)
    with pytest.raises(CheckpointError, match="temperature"):
        torch_keys.from_torch(
            tensors | {"temperature": np.zeros(())}, entries, ignore=chat_keys.IGNORABLE
        )
    bridge = torch_keys.from_torch(tensors, bridge_map(TINY.bridge), ignore=chat_keys.BESIDE_BRIDGE)
    jax.tree.map(np.testing.assert_array_equal, params["bridge"], bridge)
    del tensors["vision_encoder.blocks.1.ls2"]
    with pytest.raises(CheckpointError, match=r"1 missing:\n +vision_encoder\.blocks\.1\.ls2"):
        torch_keys.from_torch(tensors, entries)
