"""Tables between our CLIP models' parameters and the original's PyTorch keys, used both ways.

Source of the torch names: the manifests of spec stage2 section 10. `entries` explains layouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iv2_jax.interop.entries import Entry, build_entries, constant_entry
from iv2_jax.interop.torch_keys.llm import PeftNames, decoder_map
from iv2_jax.interop.torch_keys.rules import dense_rules, norm_rules
from iv2_jax.interop.torch_keys.video import encoder_map

if TYPE_CHECKING:
    from iv2_jax.models.clip import ClipConfig, SmallClipConfig
    from iv2_jax.models.text.llama_clip import LlamaClipConfig
    from iv2_jax.models.text.mobileclip import MobileClipConfig

# Tensors of released files that carry nothing.
IGNORABLE = {
    r"(.*\.)?rotary_emb\.inv_freq": "rotary frequencies, which follow from the config",
    r"(text_encoder\.)?transformer\.lm_head\.weight": "language head, which the tower never uses",
}

# Axes of the layouts: D width; V vocabulary; N positions; s one of q, k, v; h d heads and head
# width; M MLP width; C width of the text feature; P width of the pooled video.


def clip_map(
    config: ClipConfig | SmallClipConfig,
    *,
    path_prefix: str = "",
    key_prefix: str = "",
    peft: PeftNames = "new",
) -> list[Entry]:
    """Lists the entries of a large or a small CLIP model (spec stage2 7 and 10).

    Args:
        config: the model's config.
        path_prefix: put before every path of ours.
        key_prefix: put before every torch key.
        peft: names of adapted maps, `new` (`q_proj.base_layer.weight`, what peft >= 0.6 writes)
            or `old`; without adapters both are the same.

    Returns:
        Entries in the order of the original's modules.
    """
    paths, keys = f"{path_prefix}text_encoder/", f"{key_prefix}text_encoder."
    entries = build_entries([("temp", "temp", "")], {}, 0, path_prefix, key_prefix)
    entries += encoder_map(
        config.vision,
        path_prefix=f"{path_prefix}vision_encoder/",
        key_prefix=f"{key_prefix}vision_encoder.",
    )
    if hasattr(config.text, "decoder"):
        return entries + llama_clip_map(config.text, path_prefix=paths, key_prefix=keys, peft=peft)
    align = [*norm_rules("norm", "0", "P"), *dense_rules("proj", "1", "P", "C")]
    sizes = {"P": config.vision.pool_width, "C": config.text.out_width}
    entries += build_entries(
        align, sizes, 0, f"{path_prefix}vision_align/", f"{key_prefix}vision_align."
    )
    return entries + mobileclip_map(config.text, path_prefix=paths, key_prefix=keys)


def clip_delta_map(config: ClipConfig | SmallClipConfig) -> list[Entry]:
    """Lists the entries of a released delta: what CLIP training changes (spec stage2 7.1 and 10).

    These are the attentive pool, the temperature, in small models the map to the text's width, and
    the rotary frequencies that older versions of transformers save along.

    Args:
        config: the whole model's config.

    Returns:
        Entries with paths and keys of the whole model.
    """
    changed = ("temp", "vision_encoder/pool/", "vision_align/")
    entries = [entry for entry in clip_map(config) if entry.path.startswith(changed)]
    if not hasattr(config.text, "decoder"):
        return entries
    decoder = config.text.decoder

    def frequencies() -> np.ndarray:
        steps = np.arange(0, decoder.head_dim, 2, dtype=np.float32) / decoder.head_dim
        return (1.0 / decoder.rope.theta**steps).astype(np.float32)

    key = "text_encoder.transformer.layers.{}.self_attn.rotary_emb.inv_freq"
    shape = (decoder.head_dim // 2,)
    return entries + [
        constant_entry(key.format(index), shape, frequencies) for index in range(decoder.depth)
    ]


def llama_clip_map(
    config: LlamaClipConfig,
    *,
    path_prefix: str = "",
    key_prefix: str = "",
    peft: PeftNames = "new",
) -> list[Entry]:
    """Lists the entries of the LLaMA-style text tower (spec stage2 7.2).

    Args:
        config: the tower's config, with or without adapters.
        path_prefix: put before every path of ours, such as `text_encoder/`.
        key_prefix: put before every torch key, such as `text_encoder.`.
        peft: names of the adapted maps, `new` (`q_proj.base_layer.weight`) or `old`.

    Returns:
        Entries, the tables first.
    """
    rules = [
        ("proj/kernel", "text_projection", "D C"),
        ("token_embed", "transformer.embed_tokens.weight", "V D"),
    ]
    sizes = {"V": config.vocab_size, "C": config.out_width, "D": config.decoder.width}
    decoder = decoder_map(
        config.decoder,
        path_prefix=f"{path_prefix}decoder/",
        key_prefix=f"{key_prefix}transformer.",
        peft=peft,
    )
    return build_entries(rules, sizes, 0, path_prefix, key_prefix) + decoder


def mobileclip_map(
    config: MobileClipConfig, *, path_prefix: str = "", key_prefix: str = ""
) -> list[Entry]:
    """Lists the entries of the MobileCLIP text tower (spec stage2 7.3).

    Args:
        config: the tower's config.
        path_prefix: put before every path of ours, such as `text_encoder/`.
        key_prefix: put before every torch key, such as `text_encoder.`.

    Returns:
        Entries, the tables first.
    """
    sizes = {
        "V": config.vocab_size,
        "N": config.context_length,
        "D": config.width,
        "C": config.out_width,
        "s": 3,
    }
    tables = [
        ("token_embed", "embedding_layer.weight", "V D"),
        ("pos_embed", "positional_embedding.pos_embed.pos_embed", "1 1 N D"),
        *norm_rules("final_norm", "final_layer_norm", "D"),
        ("proj/kernel", "projection_layer", "D C"),
    ]
    entries = build_entries(tables, sizes, 0, path_prefix, key_prefix)
    for name, start, length in config.stacks:
        heads = config.num_heads[start]
        stack_sizes = sizes | {
            "M": config.mlp_widths[start],
            "h": heads,
            "d": config.width // heads,
        }
        block = [
            *norm_rules("norm1", "pre_norm_mha.0", "D"),
            ("attn/qkv/kernel", "pre_norm_mha.1.qkv_proj.weight", "D s h d -> (s h d) D"),
            ("attn/qkv/bias", "pre_norm_mha.1.qkv_proj.bias", "s h d -> (s h d)"),
            ("attn/proj/kernel", "pre_norm_mha.1.out_proj.weight", "h d D -> D (h d)"),
            ("attn/proj/bias", "pre_norm_mha.1.out_proj.bias", "D"),
            *norm_rules("norm2", "pre_norm_ffn.0", "D"),
            *dense_rules("mlp/fc1", "pre_norm_ffn.1", "D", "M"),
            *dense_rules("mlp/fc2", "pre_norm_ffn.4", "M", "D"),
        ]
        rules = [
            (f"{name}/{path}", f"transformer.{{}}.{key}", layout) for path, key, layout in block
        ]
        entries += build_entries(rules, stack_sizes, length, path_prefix, key_prefix, start=start)
    return entries
