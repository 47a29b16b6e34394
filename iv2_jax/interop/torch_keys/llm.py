"""Table between our language models' parameters and PyTorch keys, used both ways.

A config with `fused_qkv` has InternLM2's names, any other those of Mistral and LLaMA. Adapters have
peft's names: `old` (peft up to 0.5, what the chat release reads) keeps `X.weight` beside
`X.lora_A.default.weight`; `new` calls it `X.base_layer.weight`. Source: spec stage 3, 6.2-6.4 and
9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from iv2_jax.errors import ConfigError
from iv2_jax.interop.entries import Entry, Rule, build_entries

if TYPE_CHECKING:
    from iv2_jax.models.llm import LlmConfig
    from iv2_jax.models.llm_layers import DecoderConfig

PeftNames = Literal["old", "new"]

IGNORABLE = {
    r"(.*\.)?rotary_emb\.inv_freq": "rotary frequencies, which follow from the config",
}

# Axes of the layouts: D width; h query heads; g key heads; d head width; e maps of a group (its
# query heads, key and value); M MLP width; V vocabulary; r rank of an adapter.

# Map of ours -> (torch key inside a block, our input axes, our output axes).
_MAPS = {
    "attn/q": ("self_attn.q_proj", "D", "h d"),
    "attn/k": ("self_attn.k_proj", "D", "g d"),
    "attn/v": ("self_attn.v_proj", "D", "g d"),
    "attn/o": ("self_attn.o_proj", "h d", "D"),
    "mlp/gate": ("mlp.gate_proj", "D", "M"),
    "mlp/up": ("mlp.up_proj", "D", "M"),
    "mlp/down": ("mlp.down_proj", "M", "D"),
}
_FUSED_MAPS = {
    "attn/qkv": ("attention.wqkv", "D", "g e d"),
    "attn/o": ("attention.wo", "h d", "D"),
    "mlp/gate": ("feed_forward.w1", "D", "M"),
    "mlp/up": ("feed_forward.w3", "D", "M"),
    "mlp/down": ("feed_forward.w2", "M", "D"),
}


def llm_map(
    config: LlmConfig, *, path_prefix: str = "", key_prefix: str = "", peft: PeftNames = "old"
) -> list[Entry]:
    """Lists the entries of a language model.

    Args:
        config: the model's config; with adapters, peft's `base_model.model.` stands before every
            key.
        path_prefix: put before every path of ours, such as `llm/`.
        key_prefix: put before every torch key, such as `lm.`.
        peft: names of the adapted maps.

    Returns:
        Entries in the order of the original's modules.
    """
    decoder = config.decoder
    if decoder.lora is not None:
        key_prefix += "base_model.model."
    embed, head = ("tok_embeddings", "output") if decoder.fused_qkv else ("embed_tokens", "lm_head")
    sizes = _sizes(decoder) | {"V": config.vocab_size}
    rules: list[Rule] = [("embed/embedding", f"model.{embed}.weight", "V D")]
    entries = build_entries(rules, sizes, 0, path_prefix, key_prefix)
    if config.tied_head:
        entries = [dataclasses.replace(entries[0], copies=(f"{key_prefix}{head}.weight",))]
    entries += decoder_map(
        decoder, path_prefix=f"{path_prefix}decoder/", key_prefix=f"{key_prefix}model.", peft=peft
    )
    if not config.tied_head:
        rules = _linear_rules("head", head, "D", "V", lora=config.lora_head, peft=peft)
        entries += build_entries(rules, sizes, 0, path_prefix, key_prefix)
    return entries


def decoder_map(
    config: DecoderConfig, *, path_prefix: str = "", key_prefix: str = "", peft: PeftNames = "old"
) -> list[Entry]:
    """Lists the entries of the blocks and the final norm; arguments as in `llm_map`.

    Raises:
        ConfigError: `peft` is neither `old` nor `new`.
    """
    if peft not in ("old", "new"):
        raise ConfigError(f"peft={peft!r} must be 'old' or 'new'")
    if config.fused_qkv:
        maps, norms = _FUSED_MAPS, ("attention_norm", "ffn_norm")
    else:
        maps, norms = _MAPS, ("input_layernorm", "post_attention_layernorm")
    rules: list[Rule] = []
    for path, (key, inputs, outputs) in maps.items():
        has_lora = config.adapter(path.split("/")[1]) is not None
        rules += _linear_rules(path, key, inputs, outputs, lora=has_lora, peft=peft)
    rules += [(f"norm{i + 1}/scale", f"{key}.weight", "D") for i, key in enumerate(norms)]
    rules = [(f"blocks/{path}", f"layers.{{}}.{key}", layout) for path, key, layout in rules]
    rules.append(("norm/scale", "norm.weight", "D"))
    return build_entries(rules, _sizes(config), config.depth, path_prefix, key_prefix)


def peft_names(keys: Sequence[str]) -> PeftNames | None:
    """Tells from a state dict's keys how its adapters are named; None if it has none."""
    if not any(".lora_A." in key for key in keys):
        return None
    return "new" if any(key.endswith(".base_layer.weight") for key in keys) else "old"


def _sizes(config: DecoderConfig) -> dict[str, int]:
    """Axis sizes of the layouts."""
    return {
        "D": config.width,
        "h": config.num_heads,
        "g": config.num_kv_heads,
        "d": config.head_dim,
        "e": config.num_heads // config.num_kv_heads + 2,
        "M": config.mlp_width,
        "r": 0 if config.lora is None else config.lora.rank,
    }


def _linear_rules(
    path: str, key: str, inputs: str, outputs: str, *, lora: bool, peft: PeftNames
) -> list[Rule]:
    """Rules of a linear map without bias, and of its adapter."""

    def group(axes: str) -> str:
        return f"({axes})" if " " in axes else axes

    base = ".base_layer" if lora and peft == "new" else ""
    layout = f"{inputs} {outputs} -> {group(outputs)} {group(inputs)}"
    rules = [(f"{path}/kernel", f"{key}{base}.weight", layout)]
    if lora:
        down, up = f"{inputs} r -> r {group(inputs)}", f"r {outputs} -> {group(outputs)} r"
        rules += [
            (f"{path}/lora_a", f"{key}.lora_A.default.weight", down),
            (f"{path}/lora_b", f"{key}.lora_B.default.weight", up),
        ]
    return rules
