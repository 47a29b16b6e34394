"""Low-rank adapters (LoRA): their config, which parameters they are, folding them in and out.

The adapters themselves live in `layers.Linear`: beside `kernel` of shape `in + out` stand
`lora_a` of shape `in + (rank,)` and `lora_b` of shape `(rank,) + out`, and the layer gives
`x . kernel + (dropout(x) . lora_a) . lora_b * alpha / rank` (spec stage 3, 6.4). The functions
here work on plain parameter trees, whatever model they belong to; leading axes of scanned stacks
are found from the shapes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import ConfigError

NAMES = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Size and strength of the adapters.

    Attributes:
        rank: inner width.
        alpha: strength; the adapter's output is scaled by `alpha / rank`.
        dropout: rate of the dropout on the adapter's input, active only in training.
    """

    rank: int
    alpha: float
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank={self.rank} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora.dropout={self.dropout} must be in [0, 1)")

    @property
    def scale(self) -> float:
        """Factor of the adapter's output."""
        return self.alpha / self.rank


def mask(params: Mapping[str, Any]) -> dict[str, Any]:
    """Says which parameters belong to adapters.

    Args:
        params: nested parameters, boxed or not.

    Returns:
        Nested bools of the same structure (unboxed): True at `lora_a` and `lora_b`.
    """
    flat = traverse_util.flatten_dict(meta.unbox(dict(params)))
    return traverse_util.unflatten_dict({path: path[-1] in NAMES for path in flat})


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts parameters into the base model's and the adapters'.

    Args:
        params: nested parameters; boxes are kept.

    Returns:
        Two nested dicts; what is in one is not in the other. The first fits the same model
        without LoRA.
    """
    flat = traverse_util.flatten_dict(dict(params))
    parts: tuple[dict, dict] = ({}, {})
    for path, value in flat.items():
        parts[path[-1] in NAMES][path] = value
    base, adapters = (traverse_util.unflatten_dict(part) for part in parts)
    return base, adapters


def merge(params: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """Folds every adapter into the kernel beside it: `kernel + alpha / rank * lora_a . lora_b`.

    The sum is taken in float32 and cast to the kernel's dtype; with a bfloat16 kernel this loses
    bits that `unmerge` cannot give back (spec stage 3, 6.4).

    Args:
        params: nested parameters (NumPy or JAX), unboxed or boxed.
        config: the adapters' config.

    Returns:
        Nested unboxed parameters without adapters, for the same model with `lora=None`.

    Raises:
        ConfigError: an adapter has no kernel beside it, or is of another rank than the config's.
    """
    base, adapters = split(meta.unbox(dict(params)))
    return _add(base, adapters, config, sign=1.0)


def unmerge(
    params: Mapping[str, Any], adapters: Mapping[str, Any], config: LoraConfig
) -> dict[str, Any]:
    """Takes adapters out of merged kernels again and puts them beside them.

    Args:
        params: what `merge` gave.
        adapters: the second result of `split` on the parameters before merging.
        config: the adapters' config.

    Returns:
        Nested unboxed parameters with adapters, equal to those before merging up to rounding.
    """
    adapters = meta.unbox(dict(adapters))
    base = traverse_util.flatten_dict(_add(meta.unbox(dict(params)), adapters, config, sign=-1.0))
    return traverse_util.unflatten_dict(base | traverse_util.flatten_dict(adapters))


def _add(base: dict, adapters: dict, config: LoraConfig, sign: float) -> dict[str, Any]:
    """Base parameters with the adapters' products added to their kernels."""
    flat, parts = traverse_util.flatten_dict(base), traverse_util.flatten_dict(adapters)
    for layer in {path[:-1]: None for path in parts}:
        kernel, a, b = flat.get((*layer, "kernel")), *(parts.get((*layer, n)) for n in NAMES)
        name = "/".join(layer)
        if kernel is None or a is None or b is None:
            raise ConfigError(f"{name}: an adapter needs kernel, lora_a and lora_b side by side")
        if a.shape[-1] != config.rank:
            raise ConfigError(
                f"{name}: the adapter's rank is {a.shape[-1]}, lora.rank says {config.rank}"
            )
        flat[*layer, "kernel"] = _sum(kernel, a, b, sign * config.scale)
    return traverse_util.unflatten_dict(flat)


def _sum(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """`kernel + scale * a . b` in float32, in the kernel's dtype; leading axes are stacks."""
    xp = np if isinstance(kernel, np.ndarray) else jnp
    stacks = a.ndim + b.ndim - 2 - kernel.ndim
    lead, rank = kernel.shape[:stacks], a.shape[-1]
    inputs = math.prod(a.shape[stacks:-1])
    product = xp.matmul(
        xp.asarray(a, np.float32).reshape(*lead, inputs, rank),
        xp.asarray(b, np.float32).reshape(*lead, rank, -1),
    )
    total = xp.asarray(kernel, np.float32) + scale * product.reshape(kernel.shape)
    return total.astype(kernel.dtype)
