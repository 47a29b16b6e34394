"""Reads what `torch.save` wrote without running its code and without believing its sizes."""

from __future__ import annotations

import argparse
import ctypes
import logging
import mmap
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from iv2_jax.errors import CheckpointError
from iv2_jax.interop.tensor_file import TensorFile, TensorRef, sample

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

ENDINGS = (".pt", ".pth", ".bin")
# Where checkpoints of the original keep the weights (spec stage1 8); asked for in this order.
WRAPPERS = ("module", "model")

_BLOCK = 8 << 20  # bytes copied out of a memory map at a time


def open_pickled(path: Path, wrapper: str | None = None) -> TensorFile:
    """Opens what `torch.save` wrote; only tensors and plain values are ever unpickled.

    Args:
        path: a flat dict of tensors, or one with such a dict under a wrapper.
        wrapper: key to take the weights from; None takes a flat dict or the first of `WRAPPERS`
            there is, and logs which.

    Returns:
        The tensors. Those of the zip format (PyTorch 1.6 and later) are read when asked for; the
        older format has to be read as a whole.

    Raises:
        CheckpointError: the file is damaged, claims more than it holds, has objects other than
            tensors and plain values, or has no weights; or PyTorch is not installed.
    """
    torch = _import_torch(path)
    is_zip = zipfile.is_zipfile(path)
    (_check_zip_sizes if is_zip else _check_legacy_sizes)(path)
    # Training scripts save their parsed arguments beside the weights; a Namespace is harmless.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises many kinds for files that are no checkpoints
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be read as PyTorch weights: {reason} (if it holds other objects than "
            "tensors: load it in PyTorch where you trust it, and save only the state dict)"
        ) from error
    state, wrapper = _unwrap(path, contents, wrapper, torch)
    for key, value in state.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {key} of shape {tuple(value.shape)} is larger than what is stored of it"
            )
    maps = _mapped_ranges(path) if is_zip else []
    tensors = {
        key: TensorRef(tuple(value.shape), _numpy_dtype(value, torch), _reader(value, maps))
        for key, value in state.items()
    }
    return TensorFile(path, tensors, wrapper)


def _check_zip_sizes(path: Path) -> None:
    """Refuses an archive whose entries are packed or overlap: a small file may hold terabytes.

    `torch.save` stores its entries as they are, so they cannot be more than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as PyTorch weights: {error}") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path}: {entry.filename} is packed, {entry.compress_size:,} bytes that unfold to "
                f"{entry.file_size:,}; torch.save never packs, so the file is not read"
            )
    total, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if total > size:
        raise CheckpointError(
            f"{path}: its entries claim {total:,} bytes, the file has {size:,}; it is not read"
        )


class _Inert:
    """Takes the place of every global a pickle names; swallows whatever is done with it."""

    def __new__(cls, *_args: Any, **_named: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_named: Any) -> None:
        pass

    def __call__(self, *_args: Any, **_named: Any) -> _Inert:
        return self

    def __setstate__(self, _state: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def append(self, _value: Any) -> None:
        """Swallows an item."""

    def extend(self, _values: Any) -> None:
        """Swallows items."""


class _Sizes(pickle.Unpickler):
    """Unpickles to learn which storages there are; nothing is imported or called."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """An inert class; storage classes carry the name their elements are sized by."""
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        """Notes a storage: ('storage', class, key, device, elements, view)."""
        self.storages[str(pid[2])] = int(pid[4]) * _ELEMENT_SIZES.get(pid[1].__name__, 1)
        return _Inert()


_ELEMENT_SIZES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
}


def _check_legacy_sizes(path: Path) -> None:
    """Refuses a file of the old format whose storages claim more than the file holds."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            for _ in range(3):  # magic number, protocol, system
                _Sizes(file).load()
            found = _Sizes(file)
            found.load()
    except Exception as error:  # bytes at random make any error; the file is at fault
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as PyTorch weights: {reason}; it is damaged or of another kind"
        ) from error
    total = sum(found.storages.values())
    if total > size:
        raise CheckpointError(
            f"{path} cannot be read: its tensors claim {total:,} bytes, the file has {size:,}"
        )


def _unwrap(
    path: Path, contents: Any, wrapper: str | None, torch: Any
) -> tuple[Mapping[str, Tensor], str | None]:
    """Finds the flat dict of tensors, and the key it stood under."""
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, not a state dict")
    if wrapper is None and not _is_state(contents, torch):
        wrapper = next((k for k in WRAPPERS if _is_state(contents.get(k), torch)), None)
        if wrapper is None:
            raise CheckpointError(
                f"{path} has no dict of tensors, neither at the top nor under "
                f"{' or '.join(map(repr, WRAPPERS))}; at the top: {sample(list(contents))}"
            )
        logger.info("%s: weights taken from key %r", path, wrapper)
    if wrapper is None:
        return contents, None
    if not _is_state(contents.get(wrapper), torch):
        raise CheckpointError(
            f"{path} has no dict of tensors under {wrapper!r}; at the top: {sample(list(contents))}"
        )
    return contents[wrapper], wrapper


def _is_state(value: Any, torch: Any) -> bool:
    """Whether `value` is a non-empty dict of tensors by name."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def _numpy_dtype(tensor: Tensor, torch: Any) -> np.dtype:
    """The NumPy dtype of a torch tensor."""
    if tensor.dtype == torch.bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype


def _reader(tensor: Tensor, maps: Sequence[tuple[int, int]]) -> Callable[[], np.ndarray]:
    """Reader of one torch tensor; what lies in one of the file's memory maps is copied out."""

    def read() -> np.ndarray:
        values = _view(tensor)
        first, last = values.ctypes.data, values.ctypes.data + values.nbytes
        mapped = any(start <= first and last <= end for start, end in maps)
        return _copy_out(values) if mapped and values.flags.c_contiguous else values

    return read


def _view(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as NumPy; bfloat16, which NumPy lacks, goes through its bits."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _copy_out(values: np.ndarray) -> np.ndarray:
    """Copies mapped memory block by block, and hands each block's pages back to the system."""
    out = np.empty(values.shape, values.dtype)
    source, target = values.reshape(-1), out.reshape(-1)
    step = max(1, _BLOCK // values.itemsize)
    for start in range(0, source.size, step):
        block = source[start : start + step]
        target[start : start + step] = block
        _give_back(block.ctypes.data, block.nbytes)
    return out


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    """Addresses where this process has mapped a file; known on Linux only."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    name = str(path.resolve())
    lines = (line.split(maxsplit=5) for line in maps.read_text().splitlines())
    found = [fields[0].split("-") for fields in lines if len(fields) == 6 and fields[5] == name]
    return [(int(start, 16), int(end, 16)) for start, end in found]


def _give_back(address: int, size: int) -> None:
    """Drops the whole pages of a file's clean map; the system reads them again if need be."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        libc = ctypes.CDLL(None, use_errno=True)
        pointer, length = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
        if libc.madvise(pointer, length, mmap.MADV_DONTNEED):
            logger.debug("madvise failed (errno %d): more memory is held", ctypes.get_errno())


def _import_torch(path: Path) -> Any:
    """Imports torch, or says why it is needed."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} was written by torch.save and needs PyTorch to be read: "
            "pip install 'iv2_jax[torch]', or convert it to safetensors elsewhere"
        ) from error
    return torch
