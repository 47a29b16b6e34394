"""Reads safetensors files, one tensor at a time and nothing but its bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from iv2_jax.errors import CheckpointError
from iv2_jax.interop.tensor_file import TensorRef

ENDING = ".safetensors"

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def open_safetensors(path: Path) -> dict[str, TensorRef]:
    """References to the tensors of a safetensors file.

    The library checks the header (sizes, order, no gaps). Values are read by our own `read`: the
    library maps the file, and what was once read of a map counts as the process's memory.

    Args:
        path: the file.

    Returns:
        `{key: reference}` in the header's order.

    Raises:
        CheckpointError: the file is damaged or cut off, or has a dtype that NumPy cannot hold.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for key, value in header.items():
        if value["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {key} has dtype {value['dtype']}, which cannot be read")
        shape, dtype = tuple(value["shape"]), np.dtype(_DTYPES[value["dtype"]])
        read = _reader(path, 8 + length + value["data_offsets"][0], shape, dtype)
        tensors[key] = TensorRef(shape, dtype, read)
    return tensors


def _reader(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[], np.ndarray]:
    """Reader of one tensor at an offset of the file."""

    def read() -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        with path.open("rb") as file:
            values = np.fromfile(file, dtype=dtype, count=count, offset=offset)
        if values.size != count:
            raise CheckpointError(f"{path} was cut off while it was read; fetch it again")
        return values.reshape(shape)

    return read
