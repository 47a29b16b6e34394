"""Tables between the chat models' parameters and the original's PyTorch keys, used both ways.

Source of the torch names: spec stage3 9 and its manifests. `entries` explains layouts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from iv2_jax.interop.entries import Entry, Rule, build_entries, with_copies
from iv2_jax.interop.torch_keys import llm as llm_keys
from iv2_jax.interop.torch_keys.rules import dense_rules, norm_rules
from iv2_jax.interop.torch_keys.text import (
    layer_rules,
    position_ids_entry,
)
from iv2_jax.interop.torch_keys.video import encoder_map

if TYPE_CHECKING:
    from iv2_jax.models.bridge import BridgeConfig
    from iv2_jax.models.bridge_pretraining import BridgePretrainingConfig
    from iv2_jax.models.chat import ChatConfig

IGNORABLE: dict[str, str] = llm_keys.IGNORABLE | {
    r"qformer\.cls\..*": "language-model head of the Q-Former's own pretraining",
    r"(itm_head|vision_proj|text_proj)\..*|temp": "heads of the Q-Former's own pretraining",
    r"vision_temp_embed": "time embedding that only the Q-Former's own pretraining adds",
}

# What a dialogue model's files hold beside the bridge, for those who want the bridge alone.
BESIDE_BRIDGE: dict[str, str] = IGNORABLE | {
    r"vision_encoder\..*": "video encoder",
    r"(lm|mistral_model|llama_model)\..*": "language model",
}

# Axes of the layouts: D width of the Q-Former; V vocabulary; N positions; h d heads and head width;
# M feed-forward width; E width of the video's tokens; Q queries; X extra queries; W width of the
# language model.


def chat_map(
    config: ChatConfig,
    *,
    path_prefix: str = "",
    key_prefix: str = "",
    peft: llm_keys.PeftNames = "old",
    llm_prefix: str | None = None,
    projection: str | None = None,
) -> list[Entry]:
    """Lists the entries of a dialogue model (spec stage3 9).

    Args:
        config: the model's config.
        path_prefix: put before every path of ours.
        key_prefix: put before every torch key.
        peft: names of the adapted maps of the language model: `old` is what the release has.
        llm_prefix: put before the language model's keys. None for the released names: `lm.`
            (InternVideo2-Chat, whose bridge has `project_down`), else `mistral_model.`
            (VideoChat2, which has `llama_model.` with its other language model).
        projection: as in `bridge_map`.

    Returns:
        Entries of the encoder, if there is one, the bridge and the language model.
    """
    if llm_prefix is None:
        llm_prefix = "lm." if config.bridge.project_down else "mistral_model."
    entries: list[Entry] = []
    if config.encoder is not None:
        encoder = encoder_map(
            config.encoder,
            path_prefix=f"{path_prefix}encoder/",
            key_prefix=f"{key_prefix}vision_encoder.",
        )
        entries += [_bare_layer_scale(entry) for entry in encoder]
    entries += bridge_map(
        config.bridge,
        path_prefix=f"{path_prefix}bridge/",
        key_prefix=key_prefix,
        projection=projection,
    )
    return entries + llm_keys.llm_map(
        config.llm, path_prefix=f"{path_prefix}llm/", key_prefix=key_prefix + llm_prefix, peft=peft
    )


def _bare_layer_scale(entry: Entry) -> Entry:
    """The entry with `ls1` and `ls2` as the chat release has them, without `.gamma`."""
    keys = tuple(key.removesuffix(".gamma") for key in entry.torch_keys)
    return dataclasses.replace(entry, torch_keys=keys)


def bridge_map(
    config: BridgeConfig,
    *,
    path_prefix: str = "",
    key_prefix: str = "",
    projection: str | None = None,
) -> list[Entry]:
    """Lists the entries of the bridge (spec stage3 2.2 and 9).

    Args:
        config: the bridge's config.
        path_prefix: put before every path of ours, such as `bridge/`.
        key_prefix: put before every torch key.
        projection: torch name of the projection to the language model. None for the released
            names: `project_up` beside a `project_down` (InternVideo2-Chat), else `mistral_proj`
            (VideoChat2, which has `llama_proj` with its other language model).

    Returns:
        Entries in the order of the original's modules, the position ids among them.
    """
    if projection is None:
        projection = "project_up" if config.project_down else "mistral_proj"
    rules = [("query_tokens", "query_tokens", "1 Q D")]
    if config.num_extra_queries:
        rules.append(("extra_query_tokens", "extra_query_tokens", "1 X D"))
    rules += norm_rules("vision_norm", "vision_layernorm", "E")
    embeddings = "qformer.bert.embeddings"
    if config.text:
        rules += [
            ("embeddings/word", f"{embeddings}.word_embeddings.weight", "V D"),
            ("embeddings/position", f"{embeddings}.position_embeddings.weight", "N D"),
        ]
    rules += norm_rules("embeddings/norm", f"{embeddings}.LayerNorm")
    sizes = _bridge_sizes(config)
    key = f"{key_prefix}{embeddings}.position_ids"
    entries = [
        *build_entries(rules, sizes, 0, path_prefix, key_prefix),
        # A buffer of positions stays in the files even where the text side was taken out.
        position_ids_entry(key, config.max_length),
    ]
    entries += _layer_entries(config, sizes, path_prefix, f"{key_prefix}qformer.bert.")
    rules = dense_rules("project_up", projection, "D", "W")
    if config.project_down:
        rules += dense_rules("project_down", "project_down", "W", "D")
    return entries + build_entries(rules, sizes, 0, path_prefix, key_prefix)


def bridge_pretraining_map(config: BridgePretrainingConfig) -> list[Entry]:
    """Lists the entries of a Q-Former's pretraining, under the original's names (spec stage3 8.3).

    Args:
        config: the model's config.

    Returns:
        Entries of the encoder, the bridge without its projections, and the heads.
    """
    encoder = encoder_map(config.encoder, path_prefix="encoder/", key_prefix="vision_encoder.")
    entries = [_bare_layer_scale(entry) for entry in encoder]
    bridge = bridge_map(config.bridge, path_prefix="bridge/")
    entries += [entry for entry in bridge if not entry.path.startswith("bridge/project_")]
    head = "qformer.cls.predictions"
    rules = [
        ("temp", "temp", ""),
        *dense_rules("vision_proj", "vision_proj", "D", "J"),
        *dense_rules("text_proj", "text_proj", "D", "J"),
        *dense_rules("match_head", "itm_head", "P", "C"),
        ("lm_head/bias", f"{head}.bias", "V"),
        *dense_rules("lm_head/fc", f"{head}.transform.dense", "D", "D'"),
        *norm_rules("lm_head/norm", f"{head}.transform.LayerNorm"),
    ]
    width = config.bridge.width
    sizes = _bridge_sizes(config.bridge)
    sizes |= {"J": config.joint_width, "P": 2 * width, "C": 2}
    entries += build_entries(rules, sizes, 0)
    tied = {
        "bridge/embeddings/word": [f"{head}.decoder.weight"],
        "lm_head/bias": [f"{head}.decoder.bias"],
    }
    return with_copies(entries, tied)


def _layer_entries(
    config: BridgeConfig, sizes: dict[str, int], path_prefix: str, key_prefix: str
) -> list[Entry]:
    """Entries of the scanned groups of layers, then of the layers left over."""
    entries, step = [], config.cross_every
    for offset in range(min(step, config.depth) if config.num_groups else 0):
        entries += build_entries(
            _qformer_rules(config, f"groups/layer_{offset}", cross_attention=offset == 0),
            sizes,
            config.num_groups,
            path_prefix,
            key_prefix,
            start=offset,
            step=step,
        )
    for offset in range(config.num_tail_layers):
        number = config.num_groups * step + offset
        rules = _qformer_rules(config, f"tail/layer_{offset}", cross_attention=offset == 0)
        rules = [(path, key.format(number), layout) for path, key, layout in rules]
        entries += build_entries(rules, sizes, 0, path_prefix, key_prefix)
    return entries


def _qformer_rules(config: BridgeConfig, path: str, *, cross_attention: bool) -> list[Rule]:
    """Rules of a Q-Former layer, without the text's feed-forward where the bridge has none."""
    rules = layer_rules(path, cross_attention=cross_attention, query_mlp=True)
    return [rule for rule in rules if config.text or not rule[0].startswith(f"{path}/mlp/")]


def _bridge_sizes(config: BridgeConfig) -> dict[str, int]:
    """Axis sizes of the bridge's layouts."""
    return {
        "D": config.width,
        "V": config.vocab_size,
        "N": config.max_length,
        "h": config.num_heads,
        "d": config.width // config.num_heads,
        "M": config.mlp_width,
        "E": config.context_width,
        "Q": config.num_queries,
        "X": config.num_extra_queries,
        "W": config.llm_width,
    }
