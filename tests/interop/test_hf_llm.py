"""Language models from Hugging Face folders and llama2.c files."""

from __future__ import annotations

import dataclasses
import json
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from iv2_jax.data import tokenizers
from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import entries, hf_llm, importing, shards, weight_files
from iv2_jax.interop.torch_keys.llm import llm_map
from iv2_jax.models.generate import GenerationConfig, generate
from iv2_jax.models.llm import Llm
from iv2_jax.models.rope import RopeConfig
from iv2_jax.train import checkpoint
from tests.models import tiny_llm

VALUES = {
    "model_type": "mistral",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 23,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _folder(path, values, params, shard_bytes=None):
    """A folder as transformers writes it; gives its config."""
    config = hf_llm.from_hf_config(values)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    tensors = entries.to_torch(params, llm_map(config))
    if config.tied_head:
        del tensors["lm_head.weight"]
    sizes = {key: value.nbytes for key, value in tensors.items()}
    weight_files.write_safetensors(path, tensors.items(), sizes, shard_bytes)
    return config


@pytest.mark.parametrize("shard_bytes", [None, 4000])
@pytest.mark.parametrize("kind", ["llama", "mistral", "internlm2"])
def test_folders(tmp_path, kind, shard_bytes):
    values = VALUES | {"model_type": kind, "bias": False, "attention_bias": False}
    wanted = hf_llm.from_hf_config(values)
    assert wanted.decoder.fused_qkv == (kind == "internlm2")
    params = tiny_llm.params(wanted)
    _folder(tmp_path / "model", values, params, shard_bytes)
    assert (tmp_path / "model" / shards.INDEXES[0]).exists() == bool(shard_bytes)
    config, read = hf_llm.load_llm(tmp_path / "model")
    assert config == wanted
    jax.tree.map(np.testing.assert_array_equal, read, params)
    importing.import_model(tmp_path / "model", None, tmp_path / "out")
    read, saved = checkpoint.load_params(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert saved["model"]["kind"] == "llm"


def test_a_tied_folder_lacks_the_head(tmp_path):
    values = VALUES | {"tie_word_embeddings": True}
    params = tiny_llm.params(hf_llm.from_hf_config(values))
    _folder(tmp_path / "model", values, params)
    config, read = hf_llm.load_llm(tmp_path / "model")
    assert config.tied_head
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_weights_of_another_model(tmp_path):
    _folder(tmp_path / "model", VALUES, tiny_llm.params(hf_llm.from_hf_config(VALUES)))
    (tmp_path / "model" / "config.json").write_text(json.dumps(VALUES | {"vocab_size": 24}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \(23, 16\).*\(24, 16\)"):
        importing.import_model(tmp_path / "model", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="--model must name"):
        importing.import_model(tmp_path / "x.safetensors", None, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"neither a folder with config.json nor"):
        hf_llm.load_llm(tmp_path / "nothing")


def test_released_configs():
    """Fields as the released folders have them (spec stage 3, 6.1) give the zoo's models."""
    from iv2_jax.models.llm import ZOO

    large = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
    }
    mistral = VALUES | large | {"vocab_size": 32768}
    found = hf_llm.from_hf_config(mistral)
    assert found == dataclasses.replace(ZOO["mistral_7b"], context_length=32768)
    old = mistral | {"vocab_size": 32000, "rope_theta": 10000.0, "sliding_window": 4096}
    found = hf_llm.from_hf_config(old)
    assert found == dataclasses.replace(ZOO["mistral_7b_v0_1"], context_length=32768)
    internlm = VALUES | large
    internlm |= {
        "model_type": "internlm2",
        "vocab_size": 92544,
        "rope_theta": 50000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.5},
        "max_position_embeddings": 262144,
        "bias": False,
    }
    assert hf_llm.from_hf_config(internlm) == ZOO["internlm2_5_7b"]


def test_rope_of_transformers_4_and_5():
    def rope(**fields):
        return hf_llm.from_hf_config(VALUES | {"model_type": "llama"} | fields).decoder.rope

    linear = RopeConfig(theta=1e6, scaling="linear", factor=4.0)
    assert rope(rope_scaling={"type": "linear", "factor": 4}) == linear
    new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    assert rope(rope_theta=None, rope_parameters=new) == linear
    assert rope(rope_scaling={"rope_type": "default"}) == RopeConfig(theta=1e6)
    dynamic = RopeConfig(theta=1e6, scaling="dynamic", factor=2.0, base_length=64)
    assert rope(rope_scaling={"type": "dynamic", "factor": 2.0}) == dynamic


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'; known: internlm2, llama, mistral"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "not quantised, or a GGUF file"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types mixes"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "of type 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "of type 'linear' needs 'factor'"),
        ({"hidden_size": None}, "lacks the number 'hidden_size'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3|num_kv_heads=3"),
    ],
)
def test_what_cannot_be_run_is_refused(fields, message):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        hf_llm.from_hf_config(VALUES | fields)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["llama", "llama3", "mistral"])
def test_folders_that_transformers_wrote(tmp_path, kind):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    values = {k: v for k, v in VALUES.items() if k not in ("model_type", "torch_dtype")}
    values |= {"hidden_size": 32, "head_dim": 16}  # heads wider than the tokens
    if kind == "mistral":
        settings = transformers.MistralConfig(**values | {"sliding_window": 4})
        model = transformers.MistralForCausalLM(settings)
    else:
        values |= {"rope_scaling": LLAMA3, "rope_theta": 100.0} if kind == "llama3" else {}
        del values["sliding_window"]
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
    model.eval().save_pretrained(tmp_path, max_shard_size="8KB")
    config, params = hf_llm.load_llm(tmp_path)
    assert bool(config.decoder.rope.divisors) == (kind == "llama3")
    tokens = tiny_llm.tokens(2, 40)
    ours = jax.jit(Llm(config).apply)({"params": params}, tokens).logits
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(np.asarray(ours) - wanted).max() < 2e-5 * np.abs(wanted).max()


# llama2.c ---------------------------------------------------------------------------------------


def test_llama2c_files(tmp_path):
    config = dataclasses.replace(tiny_llm.config(tied_head=True), context_length=9)
    params = tiny_llm.params(config)
    tensors = entries.to_torch(params, llm_map(config))
    names = [key.replace(".0.", ".{}.") for key in tensors if ".1." not in key]
    order = ["embed_tokens", "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj"]
    order += ["post_attention_layernorm", "gate_proj", "down_proj", "up_proj", "model.norm"]
    raw = struct.pack("<7i", 16, 24, 2, 4, 2, 23, 9)
    for part in order:
        (name,) = (name for name in names if part in name)
        for number in range(2 if "{}" in name else 1):
            value = tensors[name.format(number)]
            if part in ("q_proj", "k_proj"):
                halves = value.reshape(-1, 2, 2, 16)
                value = halves.swapaxes(1, 2)
            raw += np.ascontiguousarray(value).tobytes()
    raw += np.full(9 * 4, 7.0, np.float32).tobytes()
    (tmp_path / "x.bin").write_bytes(raw)
    found, read = hf_llm.load_llm(tmp_path / "x.bin")
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    for bad, message in ((raw[:-4], "asks for"), (raw[:400], "cut off"), (raw[4:], "sense|cut")):
        (tmp_path / "x.bin").write_bytes(bad)
        with pytest.raises(CheckpointError, match=message):
            hf_llm.load_llm(tmp_path / "x.bin")


def test_the_tiny_storyteller(shared_dir):
    folder = shared_dir / "data" / "models"
    if not (folder / "stories260K.bin").is_file():
        pytest.skip("needs stories260K.bin of the developers' shared folder")
    config, params = hf_llm.load_llm(folder / "stories260K.bin")
    tokenizer = tokenizers.load("llama2c", folder / "tok512.bin", vocab_size=config.vocab_size)
    assert tokenizer.encode("Once upon a time") == [1, 403, 407, 261, 378]
    settings = GenerationConfig(max_new_tokens=60, eos_ids=(1, 2))
    out = generate(Llm(config), params, settings, tokens=np.array([[tokenizer.bos_id]]))
    text = tokenizer.decode(np.asarray(out.tokens[0]))
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball."
    )
