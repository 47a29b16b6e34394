"""Reads the old (pre-zip) PyTorch weight format without PyTorch, and without running its code.

`torch.save` wrote this format before PyTorch 1.6, and still does with
`_use_new_zipfile_serialization=False`. A file is five pickles in a row (magic number, protocol
version, system information, the object, the list of storage keys), then for each key the number
of elements as int64 and the raw elements. The object names its storages by persistent ids, so the
values can only be filled in at the end.

A pickle may name any function and have it called. Here it may name only those of `_GLOBALS`, and
what it gets for them are inert stand-ins (tuples and objects without settable attributes, since
a pickle may also set the state of what it was given).
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from iv2_jax.errors import CheckpointError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ZIP_MAGIC = b"PK\x03\x04"


def load_legacy_pickle(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a flat state dict.

    Args:
        path: file that `torch.save` wrote in the old format; a dict of tensors by name.

    Returns:
        Name -> array, in the file's order; every array owns its memory.

    Raises:
        CheckpointError: the file is missing, of another format, cut off, names a global that
            weights have no use for, or holds something else than tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} is cut off or damaged ({error or type(error).__name__}); fetch it again"
        ) from error


# What unpickling bytes at random may raise; the file is at fault, whichever it is.
_DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)


class _StorageType(NamedTuple):
    """Stands for a torch storage class: the dtype of its elements."""

    dtype: np.dtype


@dataclasses.dataclass(slots=True)
class _Storage:
    """A run of elements; `values` is None until the file's tail is read."""

    key: str
    dtype: np.dtype
    size: int
    values: np.ndarray | None = None


class _View(NamedTuple):
    """A tensor: a strided view, in elements, of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def to_array(self) -> np.ndarray:
        """Copies the elements out of the storage, which must have been read."""
        values = self.storage.values
        last = self.offset + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )
        if min((self.offset, *self.shape, *self.strides)) < 0:
            raise ValueError(f"tensor of shape {self.shape} has negative sizes or strides")
        if 0 in self.shape:
            return np.zeros(self.shape, values.dtype)
        if last >= len(values):
            raise ValueError(
                f"tensor of shape {self.shape} ends beyond its storage of {len(values)} elements"
            )
        steps = tuple(stride * values.itemsize for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, steps)
        return view.copy()


class _RebuildTensor:
    """Stands for `torch._utils._rebuild_tensor_v2`; has no attributes a pickle could set."""

    __slots__ = ()

    def __call__(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *_autograd: Any
    ) -> _View:
        """Checks the types only: a pickle may call this with anything."""
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(type(n) is int for n in numbers):
            raise ValueError("a tensor is described by something else than numbers")
        return _View(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
    """Stands for `torch._utils._rebuild_parameter`: a parameter is its tensor."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_autograd: Any) -> Any:
        """Drops `requires_grad` and hooks."""
        return tensor


_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{
        ("torch", f"{name}Storage"): _StorageType(np.dtype(dtype))
        for name, dtype in {
            "Double": np.float64,
            "Float": np.float32,
            "Half": np.float16,
            "BFloat16": ml_dtypes.bfloat16,
            "Long": np.int64,
            "Int": np.int32,
            "Short": np.int16,
            "Char": np.int8,
            "Byte": np.uint8,
            "Bool": np.bool_,
        }.items()
    },
}


class _Unpickler(pickle.Unpickler):
    """Gives the stand-ins of `_GLOBALS` and refuses every other global."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Looks a global up; nothing is imported."""
        if (module, name) not in _GLOBALS:
            raise CheckpointError(
                f"{self._path} names the global {module}.{name}, which weights have no use for; "
                "it was not run. Load the file in PyTorch where you trust it and save only the "
                "state dict."
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage of a persistent id: ('storage', class, key, device, size, view)."""
        tag, kind, key, _device, size, view = pid
        if tag != "storage" or not isinstance(kind, _StorageType) or type(size) is not int:
            raise pickle.UnpicklingError(f"unknown persistent id {tag!r}")
        if view is not None:
            raise CheckpointError(
                f"{self._path}: storage {key} is a view of another one, as PyTorch before 0.4 "
                "wrote them; load the file in PyTorch and save it again"
            )
        return self.storages.setdefault(key, _Storage(key, kind.dtype, size))


def _read(file: BinaryIO, path: Path) -> dict[str, np.ndarray]:
    """Reads the five pickles and the storages behind them."""
    if file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC:
        raise CheckpointError(
            f"{path} is in PyTorch's zip format (1.6 and later), not the old one; "
            "read it with iv2_jax.interop.load.open_tensors"
        )
    file.seek(0)
    _check_header(file, path)
    unpickler = _Unpickler(file, path)
    state = unpickler.load()
    _read_storages(file, _Unpickler(file, path).load(), unpickler.storages)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
    arrays = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, _View):
            raise CheckpointError(
                f"{path}: {key!r} is a {type(value).__name__}, not a tensor; only flat dicts of "
                "tensors by name are read"
            )
        arrays[key] = value.to_array()
    return arrays


def _check_header(file: BinaryIO, path: Path) -> None:
    """Checks magic number, protocol and byte order."""
    try:
        magic = _Unpickler(file, path).load()
    except _DAMAGE:
        magic = None
    if type(magic) is not int or magic != _MAGIC:
        raise CheckpointError(
            f"{path} is not a file of torch.save: it does not start with its magic number"
        )
    protocol = _Unpickler(file, path).load()
    if protocol != _PROTOCOL:
        raise CheckpointError(f"{path} has protocol {protocol!r}; only {_PROTOCOL} is known")
    system = _Unpickler(file, path).load()
    if not isinstance(system, Mapping) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path} was written on a big-endian machine; convert it there")


def _read_storages(file: BinaryIO, keys: Any, storages: Mapping[str, _Storage]) -> None:
    """Fills the storages, which stand in the order of `keys`."""
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise ValueError("the list of storages does not fit the tensors")
    for key in keys:
        storage = storages[key]
        size = int.from_bytes(_exactly(file, 8), "little", signed=True)
        if size != storage.size:
            raise ValueError(f"storage {key} has {size} elements, not {storage.size}")
        raw = _exactly(file, size * storage.dtype.itemsize)
        storage.values = np.frombuffer(raw, storage.dtype)


def _exactly(file: BinaryIO, size: int) -> bytes:
    """Reads `size` bytes, asking first whether the file has them."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    if size < 0 or size > left:
        raise EOFError(f"{size} bytes are wanted where {left} are left")
    return file.read(size)
