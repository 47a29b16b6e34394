"""How the language model of a golden case becomes our config and parameters."""

from __future__ import annotations

from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.llm import llm_map
from iv2_jax.models.llm import LlmConfig
from iv2_jax.models.llm_layers import DecoderConfig
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.rope import RopeConfig

_KNOWN_ARGUMENTS = {
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "vocab_size",
}


def llm_config(ctor: dict) -> LlmConfig:
    """Our config of the arguments of transformers' `MistralConfig` or `LlamaConfig`."""
    unread = set(ctor) - _KNOWN_ARGUMENTS
    assert not unread, f"unknown constructor arguments {sorted(unread)}"
    assert ctor.get("hidden_act", "silu") == "silu"
    decoder = DecoderConfig(
        width=ctor["hidden_size"],
        depth=ctor["num_hidden_layers"],
        num_heads=ctor["num_attention_heads"],
        mlp_width=ctor["intermediate_size"],
        num_kv_heads=ctor.get("num_key_value_heads"),
        head_dim=ctor.get("head_dim"),
        norm_epsilon=ctor.get("rms_norm_eps", 1e-6),
        rope=RopeConfig(theta=ctor.get("rope_theta", 10000.0)),
        sliding_window=ctor.get("sliding_window"),
    )
    return LlmConfig(ctor["vocab_size"], decoder, tied_head=ctor.get("tie_word_embeddings", False))


def with_lora(config: LlmConfig, lora: dict, keys: set[str]) -> LlmConfig:
    """The config with adapters where the case's tensors named `keys` have them."""
    adapted = {key.split(".lora_A")[0].rsplit(".", 1)[-1] for key in keys if ".lora_A" in key}
    targets = [name for name in config.decoder.projections if f"{name}_proj" in adapted]
    assert len(targets) + ("lm_head" in adapted) == len(adapted), f"unknown adapters in {adapted}"
    return config.with_lora(
        LoraConfig(lora["r"], lora["alpha"], lora.get("dropout", 0.0)),
        tuple(targets),
        head="lm_head" in adapted,
    )


def llm_params(weights: dict, config: LlmConfig, source: str) -> dict:
    """Our parameters from the case's weights."""
    return torch_keys.from_torch(weights, llm_map(config), source=source)
