"""Table between a `ShotNet`'s parameters and TransNetV2's or AutoShot's keys (spec stage3 13)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from iv2_jax.interop.entries import Entry, Rule, build_entries

if TYPE_CHECKING:
    from iv2_jax.models.shots import ShotConfig, ShotLayer

# Axes of the layouts: I and O channels in and out; x a window of three, u one of one (a prime tells
# two apart).
_SPATIAL = "u x x' I O -> O I u x x'"
_TEMPORAL = "x u u' I O -> O I x u u'"

# The last part of AutoShot's layer names: which candidate the architecture search took.
_CHOICES = (3, 8, 8, 8, 13, 12)


def shots_map(config: ShotConfig, *, path_prefix: str = "", key_prefix: str = "") -> list[Entry]:
    """Lists the entries of a shot-boundary network.

    Args:
        config: the network's config; `key_style` says whose names are meant.
        path_prefix: put before every path of ours.
        key_prefix: put before every torch key.

    Returns:
        Entries: the trunk's first.
    """
    autoshot = config.key_style == "autoshot"
    entries: list[Entry] = []
    in_width = 3
    for index, layer in enumerate(config.layers):
        rules = _autoshot_layer(index, layer) if autoshot else _transnet_layer(index, layer)
        for path, key, layout, out_width in rules:
            source = layer.inner if "temporal" in path else in_width
            sizes = {"I": source, "O": out_width, "x": 3, "u": 1}
            entries += build_entries([(path, key, layout)], sizes, 0, path_prefix, key_prefix)
        in_width = layer.width
    for path, key, sizes in _head(config):
        rules: list[Rule] = [
            (f"{path}/kernel", f"{key}.weight", "I O -> O I"),
            (f"{path}/bias", f"{key}.bias", "O"),
        ]
        entries += build_entries(rules, sizes, 0, path_prefix, key_prefix)
    # Batches are counted in a whole number there, in a float here (see RunningNorm).
    return [
        dataclasses.replace(entry, torch_dtype="int64") if entry.path.endswith("count") else entry
        for entry in entries
    ]


_Rule = tuple[str, str, str, int]  # a rule and the size of O


def _transnet_layer(index: int, layer: ShotLayer) -> list[_Rule]:
    """Rules of a layer in TransNetV2's names."""
    key = f"SDDCNN.{index // 2}.DDCNN.{index % 2}"
    rules: list[_Rule] = []
    for branch, width in enumerate(layer.branches):
        conv = f"{key}.Conv3D_{2**branch}.layers"
        rules += [
            (f"layer_{index}/spatial_{branch}/kernel", f"{conv}.0.weight", _SPATIAL, layer.inner),
            (f"layer_{index}/temporal_{branch}/kernel", f"{conv}.1.weight", _TEMPORAL, width),
        ]
    return rules + _norm(f"layer_{index}/norm", f"{key}.bn", layer.width)


def _autoshot_layer(index: int, layer: ShotLayer) -> list[_Rule]:
    """Rules of a layer in AutoShot's names."""
    key = f"Layer_{index}_{_CHOICES[index]}"
    rules: list[_Rule] = []
    if layer.shared:
        path = f"layer_{index}/spatial/kernel"
        rules.append((path, f"{key}.share.weight", _SPATIAL, layer.inner))
    for branch, width in enumerate(layer.branches):
        conv, path = f"{key}.conv_blocks.{branch}.layers", f"layer_{index}/temporal_{branch}/kernel"
        if layer.shared:
            rules.append((path, f"{conv}.0.weight", _TEMPORAL, width))
            continue
        spatial = f"layer_{index}/spatial_{branch}/kernel"
        rules.append((spatial, f"{conv}.0.weight", _SPATIAL, layer.inner))
        rules.append((path, f"{conv}.1.weight", _TEMPORAL, width))
    return rules + _norm(f"layer_{index}/norm", f"{key}.batch_norm", layer.width)


def _norm(path: str, key: str, width: int) -> list[_Rule]:
    """Rules of a batch norm with its running statistics."""
    names = {
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "var": "running_var",
    }
    rules = [(f"{path}/{ours}", f"{key}.{theirs}", "O", width) for ours, theirs in names.items()]
    return [*rules, (f"{path}/count", f"{key}.num_batches_tracked", "", width)]


def _head(config: ShotConfig) -> list[tuple[str, str, dict[str, int]]]:
    """Linear maps: path, key without the last part, sizes."""
    autoshot = config.key_style == "autoshot"
    suffix = ".linear" if autoshot else ""
    width, hidden = config.similarity_width, config.hidden
    # TransNetV2's only hidden map is called fc1; AutoShot's is fc1_0, and its fc1 is never used.
    maps = [("hidden", "fc1_0" if autoshot else "fc1", config.head_width, hidden)]
    if autoshot:
        maps.append(("unused", "fc1", config.head_width + hidden, hidden))
    maps += [
        ("single", "cls_layer1", hidden, 1),
        ("all", "cls_layer2", hidden, 1),
        ("similarity_projection", "frame_sim_layer.projection", sum(config.stage_widths), width),
        ("similarity", "frame_sim_layer.fc", config.lookup, width),
        ("color", "color_hist_layer.fc", config.lookup, width),
    ]
    return [(path, key + suffix, {"I": i, "O": o}) for path, key, i, o in maps]


IGNORABLE: dict[str, str] = {}
