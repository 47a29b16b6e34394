"""Reads PyTorch weight files: safetensors, and `.pt`, `.pth`, `.bin` without running their code."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from iv2_jax.errors import CheckpointError
from iv2_jax.interop import entries as entries_lib

if TYPE_CHECKING:
    from torch import Tensor

    from iv2_jax.models.student import StudentConfig

logger = logging.getLogger(__name__)

SAFETENSORS = ".safetensors"
PICKLED = (".pt", ".pth", ".bin")
# Where checkpoints of the original keep the weights (spec stage1 8); asked for in this order.
WRAPPERS = ("module", "model")

_SAFETENSORS_DTYPES = {
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


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor of a file: shape and dtype are known, values are read by `np.asarray`.

    Attributes:
        shape: its shape.
        dtype: its NumPy dtype (bfloat16 by `ml_dtypes`).
        read: returns the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads the values."""
        return np.asarray(self.read(), dtype=dtype)


class TensorFile(Mapping[str, TensorRef]):
    """The tensors of one file, read only when asked for.

    Attributes:
        path: the file.
        wrapper: key the weights stood under in a pickled checkpoint, such as `module`, or None.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorRef], wrapper: str | None = None
    ) -> None:
        self.path = path
        self.wrapper = wrapper
        self._tensors = dict(tensors)

    def __getitem__(self, key: str) -> TensorRef:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def select(self, prefix: str) -> TensorFile:
        """Keeps the keys that start with `prefix`, and takes it off.

        Raises:
            CheckpointError: no key starts with it.
        """
        kept = {k.removeprefix(prefix): v for k, v in self.items() if k.startswith(prefix)}
        if not kept:
            raise CheckpointError(
                f"{self.path}: no key starts with {prefix!r}; it has {_sample(list(self))}"
            )
        return TensorFile(self.path, kept, self.wrapper)


def open_tensors(path: str | Path, *, wrapper: str | None = None) -> TensorFile:
    """Opens a weight file.

    Args:
        path: `.safetensors`, or a `.pt`, `.pth` or `.bin` that `torch.save` wrote: a flat dict of
            tensors, or one with such a dict under `module` or `model`.
        wrapper: key to take the weights from; None takes a flat dict or the first of `WRAPPERS`
            there is, and logs which.

    Returns:
        The tensors; values are read when asked for.

    Raises:
        CheckpointError: the file is missing, of another kind, damaged, or has no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weight file {path}")
    if path.suffix == SAFETENSORS:
        return TensorFile(path, _open_safetensors(path))
    if path.suffix in PICKLED:
        return _open_pickled(path, wrapper)
    raise CheckpointError(
        f"{path}: the ending {path.suffix!r} is none of {SAFETENSORS}, {', '.join(PICKLED)}"
    )


def load_params(
    path: str | Path,
    entries: Sequence[entries_lib.Entry],
    *,
    ignore: Mapping[str, str] | None = None,
    prefix: str = "",
    wrapper: str | None = None,
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Reads a weight file of the original into our parameters; strict.

    Args:
        path: as in `open_tensors`.
        entries: the model's entries, from `torch_keys`.
        ignore: `{regular expression of whole keys: reason}` for tensors knowingly left out.
        prefix: keep only keys that start with it, and take it off (`vision_encoder.`).
        wrapper: as in `open_tensors`.
        dtype: dtype of the parameters; None keeps the file's.

    Returns:
        Nested dict of NumPy arrays.

    Raises:
        CheckpointError: the file cannot be read, or keys or shapes do not fit.
    """
    tensors = open_tensors(path, wrapper=wrapper)
    if prefix:
        left = sum(not key.startswith(prefix) for key in tensors)
        tensors = tensors.select(prefix)
        if left:
            logger.info("%s: left out %d keys that do not start with %r", path, left, prefix)
    return entries_lib.from_torch(tensors, entries, ignore=ignore, dtype=dtype, source=str(path))


def _open_safetensors(path: Path) -> dict[str, TensorRef]:
    """References to the tensors of a safetensors file, which stays memory-mapped."""
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="numpy")
        slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    tensors = {}
    for key, part in slices.items():
        name = part.get_dtype()
        if name not in _SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: {key} has dtype {name}, which cannot be read")
        read = _reader(handle, key)
        dtype = np.dtype(_SAFETENSORS_DTYPES[name])
        tensors[key] = TensorRef(tuple(part.get_shape()), dtype, read)
    return tensors


def _reader(handle: Any, key: str) -> Callable[[], np.ndarray]:
    """Reader of one tensor of an open safetensors file."""
    return lambda: handle.get_tensor(key)


def _open_pickled(path: Path, wrapper: str | None) -> TensorFile:
    """Opens what `torch.save` wrote; only tensors and plain values are ever unpickled."""
    torch = _import_torch(path)
    # Training scripts save their parsed arguments beside the weights; a Namespace is harmless.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # torch raises many kinds for files that are no checkpoints
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be read as PyTorch weights: {reason} (if it holds other objects than "
            "tensors: load it in PyTorch where you trust it, and save only the state dict)"
        ) from error
    state, wrapper = _unwrap(path, contents, wrapper, torch)
    tensors = {
        key: TensorRef(tuple(value.shape), _numpy_dtype(value, torch), _to_numpy(value, torch))
        for key, value in state.items()
    }
    return TensorFile(path, tensors, wrapper)


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
                f"{' or '.join(map(repr, WRAPPERS))}; at the top: {_sample(list(contents))}"
            )
        logger.info("%s: weights taken from key %r", path, wrapper)
    if wrapper is None:
        return contents, None
    if not _is_state(contents.get(wrapper), torch):
        raise CheckpointError(
            f"{path} has no dict of tensors under {wrapper!r}; "
            f"at the top: {_sample(list(contents))}"
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


def _to_numpy(tensor: Tensor, torch: Any) -> Callable[[], np.ndarray]:
    """Reader of one torch tensor; bfloat16, which NumPy lacks, goes through its bits."""
    if tensor.dtype == torch.bfloat16:
        return lambda: tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return lambda: tensor.detach().numpy()


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


def _sample(names: Sequence[Any]) -> str:
    """A few of the names, for messages."""
    shown = ", ".join(map(repr, names[:8]))
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def save_checkpoint(
    params: Mapping[str, Any], config: StudentConfig, folder: str | Path, *, source: str
) -> Path:
    """Writes parameters as a checkpoint that `train`, `eval` and `export` take.

    Args:
        params: the student's parameters.
        config: its config; a bare encoder is a student without alignments.
        folder: workdir to make; the checkpoint is its step 0.
        source: where the weights come from, kept in the checkpoint's config.

    Returns:
        The folder.

    Raises:
        CheckpointError: there is a checkpoint already, or the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    from iv2_jax import config as config_lib
    from iv2_jax.train import checkpoint

    folder = Path(folder)
    steps = folder / checkpoint.FOLDER
    if steps.exists() and any(steps.iterdir()):
        raise CheckpointError(f"{steps} is not empty; name another folder")
    checkpoint.check_writable(folder)
    values = {"student": config_lib.to_dict(config), "imported_from": source}
    with ocp.CheckpointManager(steps.absolute()) as manager:
        manager.save(
            0,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(dict(params)), config=ocp.args.JsonSave(values)
            ),
        )
    return folder
