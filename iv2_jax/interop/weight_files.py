"""Writes state dicts: one safetensors file, shards with an index, or `torch.save`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SINGLE = "model.safetensors"
TORCH = "model.pth"
INDEX = "model.safetensors.index.json"


def write_torch(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Writes a flat state dict by `torch.save`; gives the file's name."""
    import torch

    torch.save({key: _torch_tensor(value, torch) for key, value in tensors}, folder / TORCH)
    return TORCH


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    sizes: Mapping[str, int],
    max_bytes: int | None = None,
) -> str:
    """Writes safetensors, in shards if need be; no more than a shard is in memory beside the input.

    Args:
        folder: where to.
        tensors: keys and arrays.
        sizes: bytes of each tensor, in the same order.
        max_bytes: largest shard; a larger tensor is a shard of its own. None for one file.

    Returns:
        Name of the file, or of the index if there is more than one.
    """
    from safetensors.numpy import save_file

    plan = _shards(sizes, max_bytes)
    count = plan[-1] + 1
    names = {
        number: SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        for number in range(count)
    }
    home: dict[str, str] = {}
    held: dict[str, np.ndarray] = {}
    number = 0
    for (key, value), place in zip(tensors, plan, strict=True):
        if place != number:
            save_file(held, folder / names[number], metadata={"format": "pt"})
            held, number = {}, place
        held[key] = value
        home[key] = names[place]
    save_file(held, folder / names[number], metadata={"format": "pt"})
    if count == 1:
        return SINGLE
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": home}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return INDEX


def tensor_bytes(tensors: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each tensor, by shape and dtype alone."""
    return {
        key: math.prod(value.shape) * np.dtype(value.dtype).itemsize
        for key, value in tensors.items()
    }


def _shards(sizes: Mapping[str, int], max_bytes: int | None) -> list[int]:
    """The number of each tensor's shard, in order."""
    plan, number, filled = [], 0, 0
    for size in sizes.values():
        if max_bytes is not None and filled and filled + size > max_bytes:
            number, filled = number + 1, 0
        filled += size
        plan.append(number)
    return plan


def _torch_tensor(array: np.ndarray, torch: Any) -> Any:
    """A torch tensor of the same dtype; bfloat16, which NumPy lacks, goes through its bits."""
    array = np.array(array)  # owned and writable, which torch wants
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
