"""Reads models of llama2.c (version 0): seven numbers, then float32 arrays one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iv2_jax.errors import CheckpointError
from iv2_jax.interop.tensor_file import TensorFile, TensorRef

if TYPE_CHECKING:
    from iv2_jax.models.llm import LlmConfig

ENDING = ".bin"


def read_llama2c(path: str | Path) -> tuple[LlmConfig, TensorFile]:
    """Reads a small model: config, and tensors under Hugging Face's names.

    Raises:
        CheckpointError: the file's size is not the one its numbers ask for.
    """
    from iv2_jax.models.llm import LlmConfig
    from iv2_jax.models.llm_layers import DecoderConfig

    path = Path(path)
    raw = np.fromfile(path, np.float32)
    if raw.size < 7:
        raise CheckpointError(f"{path} is no model of llama2.c: it is shorter than its header")
    width, hidden, depth, heads, kv_heads, vocab, context = map(int, raw[:7].view(np.int32))
    tied, vocab = vocab > 0, abs(vocab)
    if min(width, hidden, depth, heads, kv_heads, vocab, context) < 1 or width % heads:
        raise CheckpointError(f"{path} is no model of llama2.c: its header makes no sense")
    head_dim = width // heads
    layer = "model.layers.{}."
    table = [
        ("model.embed_tokens.weight", 0, (vocab, width)),
        (layer + "input_layernorm.weight", 0, (width,)),
        (layer + "self_attn.q_proj.weight", heads, (width, width)),
        (layer + "self_attn.k_proj.weight", kv_heads, (kv_heads * head_dim, width)),
        (layer + "self_attn.v_proj.weight", 0, (kv_heads * head_dim, width)),
        (layer + "self_attn.o_proj.weight", 0, (width, width)),
        (layer + "post_attention_layernorm.weight", 0, (width,)),
        (layer + "mlp.gate_proj.weight", 0, (hidden, width)),
        (layer + "mlp.down_proj.weight", 0, (width, hidden)),
        (layer + "mlp.up_proj.weight", 0, (hidden, width)),
        ("model.norm.weight", 0, (width,)),
    ]
    tensors, at = {}, 7
    for name, turned, shape in table:
        for number in range(depth if "{}" in name else 1):
            count = int(np.prod(shape))
            values = raw[at : at + count]
            at += count
            if values.size < count:
                raise CheckpointError(f"{path} ends before {name.format(number)}: it is cut off")
            if turned:  # rows that rotate together stand side by side; ours are halves of a head
                values = values.reshape(turned, -1, 2, shape[1]).swapaxes(1, 2)
            values = values.reshape(shape)
            tensors[name.format(number)] = TensorRef(shape, values.dtype, lambda v=values: v)
    at += context * head_dim  # two tables of the rotation, which follow from the numbers
    if not tied:
        values = raw[at : at + vocab * width].reshape(vocab, width)
        tensors["lm_head.weight"] = TensorRef(values.shape, values.dtype, lambda: values)
        at += vocab * width
    if at != raw.size:
        raise CheckpointError(f"{path} has {raw.size} numbers, its header asks for {at}")
    decoder = DecoderConfig(width, depth, heads, hidden, num_kv_heads=kv_heads)
    return LlmConfig(vocab, decoder, tied_head=tied, context_length=context), TensorFile(
        path, tensors
    )
