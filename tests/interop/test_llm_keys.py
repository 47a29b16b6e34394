"""The language models' key maps and PyTorch modules, both name families, with and without adapters.

The whole chat releases are in `test_chat_keys`; here it is their language model, and what they do
not have: peft's newer names, tied heads, rotary buffers.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from iv2_jax import config as config_lib
from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.llm import IGNORABLE, decoder_map, llm_map, peft_names
from iv2_jax.models import llm, lora
from iv2_jax.models.llm import Llm
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.rope import RopeConfig
from tests.models import tiny_llm

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests" / "chat"
RELEASES = {
    "chat_internvideo2_chat_8b": "mistral_7b_lora",
    "chat_internvideo2_chat_8b_internlm2_5": "internlm2_5_7b_lora",
    "chat_internvideo2_chat_8b_merged_lora": "mistral_7b",
}
ADAPTERS = LoraConfig(3, 6.0)
TINY = {
    "mistral": tiny_llm.config(sliding_window=3),
    "internlm": tiny_llm.config(
        fused_qkv=True, rope=RopeConfig(scaling="dynamic", factor=2.0, base_length=4)
    ),
    "linear": tiny_llm.config(rope=RopeConfig(500.0, "linear", 4.0), head_dim=6),
    "stretched": tiny_llm.config(rope=RopeConfig(divisors=(1.0, 3.0))),
    "tied": tiny_llm.config(tied_head=True),
    "mistral_lora": tiny_llm.config().with_lora(ADAPTERS, head=True),
    "internlm_lora": tiny_llm.config(fused_qkv=True).with_lora(ADAPTERS),
    "q_and_v_lora": tiny_llm.config().with_lora(ADAPTERS, ("q", "v")),
}


def _shapes(tree):
    flat = traverse_util.flatten_dict(meta.unbox(tree), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


@pytest.mark.parametrize("name", RELEASES)
def test_keys_and_shapes_are_the_originals(name):
    content = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    wanted = {k: tuple(shape) for k, (shape, _) in content.items() if k.startswith("lm.")}
    config = llm.ZOO[RELEASES[name]]
    entries = llm_map(config, key_prefix="lm.")
    assert torch_keys.torch_shapes(entries) == wanted
    abstract = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in wanted.items()}
    read = torch_keys.from_torch(abstract, entries)
    assert _shapes(read) == _shapes(torch_keys.abstract_params(entries))
    init = jax.eval_shape(Llm(config).init, jax.random.key(0), np.zeros((1, 2), np.int32))
    assert _shapes(read) == _shapes(init["params"])


def _random(config, seed=0, peft="old"):
    """A random state dict of a tiny config."""
    rng = np.random.default_rng(seed)
    entries = llm_map(config, peft=peft)
    tensors = {}
    for entry in entries:
        for key in entry.torch_keys:
            noise = rng.normal(size=entry.torch_shape).astype(np.float32)
            tensors[key] = 1 + 0.2 * noise if "norm" in key else noise * 0.3
        tensors.update(dict.fromkeys(entry.copies, tensors[entry.torch_keys[0]]))
    return tensors, entries


@pytest.mark.parametrize("peft", ["old", "new"])
@pytest.mark.parametrize("name", TINY)
def test_round_trip_is_bit_exact(name, peft):
    config = TINY[name]
    tensors, entries = _random(config, peft=peft)
    params = torch_keys.from_torch(tensors, entries)
    init = jax.eval_shape(Llm(config).init, jax.random.key(0), np.zeros((1, 2), np.int32))
    assert _shapes(params) == _shapes(init["params"])
    back = torch_keys.to_torch(params, entries)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_names_of_adapted_maps():
    config = TINY["q_and_v_lora"]
    for peft, base in (("old", ""), ("new", ".base_layer")):
        keys = set(torch_keys.torch_shapes(llm_map(config, key_prefix="lm.", peft=peft)))
        layer = "lm.base_model.model.model.layers.1.self_attn"
        assert f"{layer}.q_proj{base}.weight" in keys
        assert f"{layer}.q_proj.lora_A.default.weight" in keys
        assert f"{layer}.k_proj.weight" in keys
        assert peft_names(sorted(keys)) == peft
    assert peft_names(list(torch_keys.torch_shapes(llm_map(config.without_lora())))) is None
    with pytest.raises(ConfigError, match="peft='newer'"):
        decoder_map(config.decoder, peft="newer")


def test_merged_adapters_are_the_plain_model():
    config = TINY["internlm_lora"]
    tensors, entries = _random(config)
    params = torch_keys.from_torch(tensors, entries)
    merged = lora.merge(params, config.decoder.lora)
    plain = torch_keys.to_torch(merged, llm_map(config.without_lora()))
    key = "model.layers.1.attention.wqkv"
    a, b = (tensors[f"base_model.model.{key}.lora_{x}.default.weight"] for x in "AB")
    wanted = tensors[f"base_model.model.{key}.weight"] + 2.0 * b @ a
    np.testing.assert_allclose(plain[f"{key}.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_rotary_buffers_are_left_out():
    tensors, entries = _random(TINY["mistral"])
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = tensors | {key: np.ones(2, np.float32)}
    with pytest.raises(CheckpointError, match=r"rotary_emb\.inv_freq"):
        torch_keys.from_torch(extra, entries)
    read = torch_keys.from_torch(extra, entries, ignore=IGNORABLE)
    plain = torch_keys.from_torch(tensors, entries)
    jax.tree.map(np.testing.assert_array_equal, read, plain)


def test_fused_rows_are_grouped_by_key_head():
    """Rows of a group: its query heads, its key head, its value head (spec stage 3, 6.2)."""
    config = TINY["internlm"]
    tensors, entries = _random(config)
    params = torch_keys.from_torch(tensors, entries)
    ours = params["decoder"]["blocks"]["attn"]["qkv"]["kernel"][1]
    rows = tensors["model.layers.1.attention.wqkv.weight"].reshape(2, 4, 4, 16)
    np.testing.assert_array_equal(ours[:, 1, 3], rows[1, 3].T)
    np.testing.assert_array_equal(ours[:, 0, 2], rows[0, 2].T)


@pytest.mark.torch
@pytest.mark.parametrize("name", TINY)
def test_torch_module_gives_our_outputs(name):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import llm as torch_llm

    config = TINY[name]
    tensors, entries = _random(config)
    params = {"params": torch_keys.from_torch(tensors, entries)}
    contents = json.loads(json.dumps({"kind": "llm", "model": config_lib.to_dict(config)}))
    module = torch_llm.from_config(contents)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    tokens = tiny_llm.tokens(2, 7)
    mask = np.array([[0, 0, 1, 1, 1, 1, 1], [1] * 7], bool)
    ours = jax.jit(lambda p: Llm(config).apply(p, tokens, mask=mask))(params)
    with torch.no_grad():
        theirs = module(torch.from_numpy(tokens).long(), mask=torch.from_numpy(mask))
        embedded = torch_llm.embed(module, torch.from_numpy(tokens).long())
        again = torch_llm.logits(module, embedded, torch.from_numpy(mask))
    pairs = [(theirs.logits, ours.logits), (again, ours.logits), (theirs.hidden, ours.hidden)]
    for got, wanted in pairs:
        error = np.abs(got.numpy() - np.asarray(wanted))[mask].max()
        assert error < 1e-5 * np.abs(wanted).max()


@pytest.mark.torch
def test_torch_greedy_is_ours():
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import llm as torch_llm
    from iv2_jax.models.generate import GenerationConfig, generate

    config = TINY["mistral"]
    tensors, entries = _random(config)
    params = torch_keys.from_torch(tensors, entries)
    module = torch_llm.from_config({"kind": "llm", "model": config_lib.to_dict(config)})
    module.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    embeddings = params["embed"]["embedding"][tiny_llm.tokens(2, 5)]
    mask = np.array([[0, 0, 1, 1, 1], [1] * 5], bool)
    free = generate(
        Llm(config),
        params,
        GenerationConfig(max_new_tokens=6, eos_ids=()),
        embeddings=embeddings,
        mask=mask,
    )
    eos_id = int(free.tokens[0, 2])
    given = torch.from_numpy(embeddings), 6
    theirs = module.greedy(*given, mask=torch.from_numpy(mask), eos_id=eos_id).numpy()
    ended = np.asarray(free.tokens).tolist()
    for row in ended:
        if eos_id in row:
            row[row.index(eos_id) :] = [eos_id] * (6 - row.index(eos_id))
    np.testing.assert_array_equal(theirs, ended)
    with pytest.raises(ValueError, match="kind must be 'llm'"):
        torch_llm.from_config({"kind": "encoder"})
