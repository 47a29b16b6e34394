"""Table between our classifiers' parameters and the original's PyTorch keys (spec stage1 8)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from iv2_jax.interop.entries import Entry, build_entries
from iv2_jax.interop.torch_keys.video import encoder_map

if TYPE_CHECKING:
    from iv2_jax.models.classifier import ClassifierConfig

# Axes of the layouts: D width; P pooled width; Q hidden size of the extra MLP; W size of a merged
# token; F features of the head; K classes.


def classifier_map(
    config: ClassifierConfig, *, path_prefix: str = "", key_prefix: str = ""
) -> list[Entry]:
    """Lists the entries of a classifier: encoder and head.

    Args:
        config: the classifier's config.
        path_prefix: put before every path of ours.
        key_prefix: put before every torch key.

    Returns:
        Entries: the encoder's first.
    """
    encoder = config.encoder
    rules = []
    if config.head == "ap":
        rules += [
            *_affine("extra_norm", "extra_mlp.0", "P"),
            ("extra_mlp/fc1/kernel", "extra_mlp.1.fc1.weight", "P Q -> Q P"),
            ("extra_mlp/fc1/bias", "extra_mlp.1.fc1.bias", "Q"),
            ("extra_mlp/fc2/kernel", "extra_mlp.1.fc2.weight", "Q P -> P Q"),
            ("extra_mlp/fc2/bias", "extra_mlp.1.fc2.bias", "P"),
        ]
    rules += _affine("fc_norm", "fc_norm", "P")
    if config.by_frame:
        rules += [("down/kernel", "down.0.weight", "D P -> P D"), ("down/bias", "down.0.bias", "P")]
    if config.merges_tokens:
        rules += [] if config.merge_norm == "kaiming_BN" else _affine("down_norm", "down_norm", "W")
        if config.merge_norm != "LN":
            rules += [
                ("down_norm/mean", "down_norm.running_mean", "W"),
                ("down_norm/var", "down_norm.running_var", "W"),
                ("down_norm/count", "down_norm.num_batches_tracked", ""),
            ]
    rules += [("head/kernel", "head.weight", "F K -> K F"), ("head/bias", "head.bias", "K")]
    sizes = {
        "D": encoder.width,
        "P": encoder.pool_width,
        "Q": 4 * encoder.pool_width,
        "W": config.merge_width,
        "F": config.head_width,
        "K": config.num_classes,
    }
    entries = build_entries(rules, sizes, 0, path_prefix, key_prefix)
    # The original counts batches in a whole number; ours is a float, so that gradients can be taken
    # of the whole tree.
    entries = [
        dataclasses.replace(entry, torch_dtype="int64")
        if entry.path.endswith("down_norm/count")
        else entry
        for entry in entries
    ]
    return encoder_map(encoder, path_prefix=f"{path_prefix}encoder/", key_prefix=key_prefix) + (
        entries
    )


def _affine(path: str, key: str, axis: str) -> list[tuple[str, str, str]]:
    """Rules of a norm with scale and bias."""
    return [(f"{path}/scale", f"{key}.weight", axis), (f"{path}/bias", f"{key}.bias", axis)]


IGNORABLE: dict[str, str] = {}
