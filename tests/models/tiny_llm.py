"""A tiny language model with weights large enough that its tokens differ clearly."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax.core import meta

from iv2_jax.models.llm import Llm, LlmConfig
from iv2_jax.models.llm_layers import DecoderConfig

DECODER = DecoderConfig(width=16, depth=2, num_heads=4, num_kv_heads=2, mlp_width=24)
VOCAB = 23


def config(*, vocab_size: int = VOCAB, tied_head: bool = False, **decoder: object) -> LlmConfig:
    """The tiny config with some fields of the decoder replaced."""
    return LlmConfig(vocab_size, dataclasses.replace(DECODER, **decoder), tied_head=tied_head)


def params(config: LlmConfig, seed: int = 0) -> dict:
    """Random parameters: matrices keep a vector's size, norms are near one."""
    shapes = meta.unbox(
        jax.eval_shape(Llm(config).init, jax.random.key(0), np.zeros((1, 2), np.int32))
    )["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.2 * noise
        if path[-1].key == "embedding":
            return noise
        width = config.decoder.width
        return noise * (2.0 if path[0].key == "head" else 1.0) / np.float32(width**0.5)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def tokens(*shape: int, seed: int = 0, vocab_size: int = VOCAB) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)
