"""Rules of the layers that every family has."""

from __future__ import annotations

from iv2_jax.interop.entries import Rule


def norm_rules(path: str, key: str, axis: str = "D") -> list[Rule]:
    """Rules of a LayerNorm."""
    return [(f"{path}/scale", f"{key}.weight", axis), (f"{path}/bias", f"{key}.bias", axis)]


def dense_rules(path: str, key: str, inputs: str, outputs: str) -> list[Rule]:
    """Rules of a linear map with bias."""
    return [
        (f"{path}/kernel", f"{key}.weight", f"{inputs} {outputs} -> {outputs} {inputs}"),
        (f"{path}/bias", f"{key}.bias", outputs),
    ]
