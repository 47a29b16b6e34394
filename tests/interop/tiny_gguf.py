"""Tiny GGUF files written with the package `gguf`, as llama.cpp's converter writes large ones."""

from __future__ import annotations

import gguf
import numpy as np

from iv2_jax.interop import entries
from iv2_jax.interop.torch_keys.llm import llm_map

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(key: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    stem = key.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    _, _, number, rest = stem.split(".", 3)
    return f"blk.{number}.{_NAMES[rest]}.weight"


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order: those that rotate together side by side."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def quantised(weight: np.ndarray, kind: str) -> np.ndarray:
    """What is left of a weight that is stored as a type; vectors are always float32."""
    if weight.ndim == 1 or kind == "F32":
        return weight
    kind = gguf.GGMLQuantizationType[kind]
    return gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)


def hf_tensors(config, params) -> dict[str, np.ndarray]:
    """The weights under Hugging Face's names."""
    tensors = entries.to_torch(params, llm_map(config))
    if config.tied_head:
        del tensors["lm_head.weight"]
    return tensors


def write(path, config, params, kind="F32", metadata=None, extra=None, arch="llama") -> None:
    """Writes a model; `metadata(writer)` adds more, `extra` are further tensors."""
    writer, decoder = gguf.GGUFWriter(path, arch), config.decoder
    writer.add_block_count(decoder.depth)
    writer.add_context_length(config.context_length or 99)
    writer.add_embedding_length(decoder.width)
    writer.add_feed_forward_length(decoder.mlp_width)
    writer.add_head_count(decoder.num_heads)
    writer.add_head_count_kv(decoder.num_kv_heads)
    if decoder.head_dim * decoder.num_heads != decoder.width:
        writer.add_key_length(decoder.head_dim)
        writer.add_value_length(decoder.head_dim)
    writer.add_rope_freq_base(decoder.rope.theta)
    writer.add_layer_norm_rms_eps(decoder.norm_epsilon)
    if metadata is not None:
        metadata(writer)
    tensors = {gguf_name(key): value for key, value in hf_tensors(config, params).items()}
    for name, value in tensors.items():
        part = name.split(".")[2] if name.startswith("blk.") else ""
        heads = {"attn_q": decoder.num_heads, "attn_k": decoder.num_kv_heads}.get(part)
        value = value if heads is None else pairs(value, heads)
        stored = gguf.GGMLQuantizationType["F32" if value.ndim == 1 else kind]
        writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
