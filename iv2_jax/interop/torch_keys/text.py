"""Table between BERT's parameters and the original's PyTorch keys, used both ways.

Source of the torch names: the manifests of spec stage2 section 10. `entries` explains layouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iv2_jax.interop.entries import Entry, Rule, build_entries, constant_entry, with_copies
from iv2_jax.interop.torch_keys.rules import dense_rules, norm_rules

if TYPE_CHECKING:
    from iv2_jax.models.text.bert import BertConfig

IGNORABLE: dict[str, str] = {
    r"(.*\.)?pooler\.dense\.(weight|bias)": "pooler, which no model of the family uses",
    r"(.*\.)?cls\.seq_relationship\.(weight|bias)": "next-sentence head of the bare BERT release",
}
# For models without the masked-LM head, read from a file of pretraining.
HEAD: dict[str, str] = {r"(.*\.)?cls\.predictions\..*": "masked-LM head, which the model lacks"}

# Axes of the layouts: D width; V vocabulary; N positions; T token types; h d heads and head width;
# M feed-forward width; E width of the context.


def bert_map(config: BertConfig, *, path_prefix: str = "", key_prefix: str = "") -> list[Entry]:
    """Lists the entries of BERT (spec stage2 3 and 10).

    With the masked-LM head the keys are the pretraining class's (`bert.encoder...`, `cls...`),
    without it those of the bare model of retrieval (`encoder...`).

    Args:
        config: the model's config.
        path_prefix: put before every path of ours, such as `text_encoder/`.
        key_prefix: put before every torch key, such as `text_encoder.`.

    Returns:
        Entries in the order of the original's modules. The position ids and both tied tensors of
        the head are written by exports and need not be in a file.
    """
    sizes = {
        "D": config.width,
        "V": config.vocab_size,
        "N": config.max_length,
        "T": config.token_types,
        "h": config.num_heads,
        "d": config.width // config.num_heads,
        "M": config.mlp_width,
        "E": config.context_width,
    }
    bert = f"{key_prefix}bert." if config.mlm_head else key_prefix
    tables = [
        ("embeddings/word", "embeddings.word_embeddings.weight", "V D"),
        ("embeddings/position", "embeddings.position_embeddings.weight", "N D"),
        ("embeddings/token_type", "embeddings.token_type_embeddings.weight", "T D"),
        *norm_rules("embeddings/norm", "embeddings.LayerNorm"),
    ]
    entries = build_entries(tables, sizes, 0, path_prefix, bert)
    entries.insert(0, position_ids_entry(f"{bert}embeddings.position_ids", config.max_length))
    entries += build_entries(
        layer_rules("text_layers"), sizes, config.fusion_layer, path_prefix, bert
    )
    if config.num_fusion_layers:
        entries += build_entries(
            layer_rules("fusion_layers", cross_attention=True),
            sizes,
            config.num_fusion_layers,
            path_prefix,
            bert,
            start=config.fusion_layer,
        )
    if config.mlm_head:
        head = [
            ("head/bias", "cls.predictions.bias", "V"),
            *dense_rules("head/fc", "cls.predictions.transform.dense", "D", "D'"),
            *norm_rules("head/norm", "cls.predictions.transform.LayerNorm"),
        ]
        entries += build_entries(head, sizes, 0, path_prefix, key_prefix)
        decoder = f"{key_prefix}cls.predictions.decoder"
        tied = {"embeddings/word": [f"{decoder}.weight"], "head/bias": [f"{decoder}.bias"]}
        entries = with_copies(entries, {path_prefix + path: keys for path, keys in tied.items()})
    return entries


def position_ids_entry(key: str, length: int) -> Entry:
    """The buffer `(1, length)` of position numbers that the original's files hold."""
    return constant_entry(key, (1, length), lambda: np.arange(length, dtype=np.int64)[None])


def layer_rules(path: str, *, cross_attention: bool = False, query_mlp: bool = False) -> list[Rule]:
    """Rules of a stack of `models.text.bert_layers.Layer`.

    Args:
        path: path of the stack.
        cross_attention: as in the module.
        query_mlp: as in the module.

    Returns:
        Rules whose keys, `encoder.layer.{}...`, number the layers; axes as named above.
    """
    key = "encoder.layer.{}"
    rules = _attention_rules(f"{path}/attn", f"{key}.attention", "D")
    if cross_attention:
        rules += _attention_rules(f"{path}/cross_attn", f"{key}.crossattention", "E")
    rules += _mlp_rules(f"{path}/mlp", key, "")
    if query_mlp:
        rules += _mlp_rules(f"{path}/mlp_query", key, "_query")
    return rules


def _attention_rules(path: str, key: str, context: str) -> list[Rule]:
    """Rules of an attention sub-layer whose keys and values come from width `context`."""
    rules: list[Rule] = []
    for name, module, axis in (("q", "query", "D"), ("k", "key", context), ("v", "value", context)):
        rules += [
            (f"{path}/{name}/kernel", f"{key}.self.{module}.weight", f"{axis} h d -> (h d) {axis}"),
            (f"{path}/{name}/bias", f"{key}.self.{module}.bias", "h d -> (h d)"),
        ]
    return [
        *rules,
        (f"{path}/proj/kernel", f"{key}.output.dense.weight", "h d D -> D (h d)"),
        (f"{path}/proj/bias", f"{key}.output.dense.bias", "D"),
        *norm_rules(f"{path}/norm", f"{key}.output.LayerNorm"),
    ]


def _mlp_rules(path: str, key: str, suffix: str) -> list[Rule]:
    """Rules of a feed-forward sub-layer; `suffix` tells the queries' from the text's."""
    return [
        *dense_rules(f"{path}/fc1", f"{key}.intermediate{suffix}.dense", "D", "M"),
        *dense_rules(f"{path}/fc2", f"{key}.output{suffix}.dense", "M", "D"),
        *norm_rules(f"{path}/norm", f"{key}.output{suffix}.LayerNorm"),
    ]
