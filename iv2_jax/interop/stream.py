"""Writes weight files straight into a checkpoint, one tensor at a time.

A 6B model is 24 GB of parameters; here no more than one tensor of the file and the slice of ours
that it fills are in memory at once. Orbax makes the checkpoint with parameters of no size; each is
then written anew, slice by slice, in the same array format (zarr 2), in a folder that gets its name
only when everything is in it.
"""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.errors import CheckpointError
from iv2_jax.interop.entries import Entry, check_copies, plan
from iv2_jax.interop.tensor_file import TensorRef

_CHUNK = 32 << 20  # bytes of an array that are one file at most
_SHOWN = 10


def import_tensors(
    tensors: Mapping[str, TensorRef],
    entries: Sequence[Entry],
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    ignore: Mapping[str, str] | None = None,
    dtype: Any = np.float32,
    path_prefix: str = "",
    allow_nonfinite: bool = False,
    source: str = "state dict",
) -> int:
    """Writes a checkpoint of step 0 from opened weights; strict.

    Args:
        tensors: from `load.open_tensors`.
        entries: the model's entries.
        folder: workdir to make.
        config: what to keep as the checkpoint's config.
        ignore: `{regular expression of whole keys: reason}` for tensors knowingly left out.
        dtype: dtype of the parameters; None keeps the file's.
        path_prefix: put before every path, such as `encoder/`.
        allow_nonfinite: take weights with NaNs or infinities.
        source: what messages call the tensors.

    Returns:
        Number of parameters.

    Raises:
        CheckpointError: keys or shapes do not fit, values are not finite, or there is a checkpoint
            already. Nothing is left of what was written.
    """
    parts = plan(tensors, entries, ignore=ignore, source=source)
    paths = [path_prefix + entry.path for entry, _ in parts]
    bad: list[str] = []
    with new_checkpoint(Path(folder), paths, config) as arrays:
        for (entry, keys), path in zip(parts, paths, strict=True):
            bad += _write(arrays / path.replace("/", "."), entry, keys, tensors, dtype)
            check_copies(entry, keys[0], tensors, source)
        if bad and not allow_nonfinite:
            shown = "\n".join(f"    {key}" for key in bad[:_SHOWN])
            more = f"\n    ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            raise CheckpointError(
                f"{source} has {len(bad)} tensors with NaNs or infinities:\n{shown}{more}\n"
                "  such weights come from a run that diverged or a damaged file; "
                "--allow-nonfinite takes them all the same"
            )
    return sum(math.prod(entry.shape) for entry, _ in parts)


@contextmanager
def new_checkpoint(folder: Path, paths: Sequence[str], config: Mapping[str, Any]) -> Iterator[Path]:
    """Makes the checkpoint of step 0 of a workdir, whole or not at all.

    Args:
        folder: the workdir.
        paths: paths of the parameters, `/` between the names.
        config: the checkpoint's config, plain values.

    Yields:
        The folder to write the arrays to, each under its path with `.` for `/`.

    Raises:
        CheckpointError: there is a checkpoint already, or the folder cannot be written.
    """
    import orbax.checkpoint as ocp
    from flax import traverse_util

    from iv2_jax.train import checkpoint

    steps = folder / checkpoint.FOLDER
    if steps.exists() and any(steps.iterdir()):
        raise CheckpointError(f"{steps} is not empty; name another folder")
    made = not folder.exists()
    checkpoint.check_writable(folder)
    work = folder / f".importing-{uuid.uuid4().hex}"  # not mkdtemp: others shall read it too
    try:
        tree = traverse_util.unflatten_dict({path: np.zeros(1) for path in paths}, sep="/")
        handlers = {
            "params": ocp.StandardCheckpointHandler(use_ocdbt=False),
            "config": ocp.JsonCheckpointHandler(),
        }
        with ocp.CheckpointManager(work.absolute(), item_handlers=handlers) as manager:
            items = {
                "params": ocp.args.StandardSave(tree),
                "config": ocp.args.JsonSave(dict(config)),
            }
            manager.save(0, args=ocp.args.Composite(**items))
        yield work / "0" / "params"
        if steps.exists():
            steps.rmdir()
        os.rename(work, steps)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise CheckpointError(f"cannot write to {folder}: {reason}") from error
        raise


def _write(
    folder: Path,
    entry: Entry,
    keys: Sequence[str],
    tensors: Mapping[str, TensorRef],
    dtype: Any,
) -> list[str]:
    """Writes one parameter; gives the keys whose values are not finite."""
    if dtype is None:
        dtype = entry.own_dtype([tensors[key].dtype for key in keys])
    dtype = np.dtype(dtype)
    _create(folder, entry, dtype)
    return [
        key
        for index, key in enumerate(keys)
        if not _write_slice(folder, entry, index if entry.stacked else None, tensors[key], dtype)
    ]


def _write_slice(
    folder: Path, entry: Entry, index: int | None, tensor: TensorRef, dtype: np.dtype
) -> bool:
    """Writes what one torch tensor holds; says whether all of it is finite.

    Nothing outlives the call, and the file's values are let go before ours are written.
    """
    values = np.array(entry.slice_from_torch(tensor), dtype, order="C").reshape(entry.slice_shape)
    number = "" if index is None else f"{index}."
    return _write_chunks(folder, number, values, _rows(entry.slice_shape, dtype))


def _write_chunks(folder: Path, number: str, values: np.ndarray, rows: int) -> bool:
    """Writes one slice as files of `rows` of its first axis; says whether all of it is finite."""
    if not values.ndim:
        values = values[None]
        names = [number.rstrip(".") or "0"]
    else:
        rest = ".0" * (values.ndim - 1)
        names = [f"{number}{chunk}{rest}" for chunk in range(-(-values.shape[0] // rows))]
    finite = True
    for chunk, name in enumerate(names):
        block = values[chunk * rows : (chunk + 1) * rows]
        finite = finite and bool(np.isfinite(block).all())
        with (folder / name).open("wb") as file:
            block.tofile(file)
            padding = (rows - block.shape[0]) * block[0].nbytes
            file.write(bytes(padding))  # chunks are of one size; what is beyond is never read
    return finite


def _rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """How many of the first axis make a chunk."""
    if not shape:
        return 1
    row = math.prod(shape[1:]) * dtype.itemsize
    return max(1, min(shape[0], _CHUNK // max(row, 1)))


def _create(folder: Path, entry: Entry, dtype: np.dtype) -> None:
    """Makes the array of a parameter, without values, in place of the one Orbax made.

    Chunks are as they are in memory, so that writing one needs no memory: packing would save a
    tenth, as weights are all but noise.
    """
    import tensorstore as ts

    shutil.rmtree(folder)
    shape = entry.slice_shape
    chunks = [_rows(shape, dtype), *shape[1:]] if shape else []
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder.absolute())},
        "metadata": {
            "shape": list(entry.shape),
            "chunks": [1, *chunks] if entry.stacked else chunks,
            "compressor": None,
        },
    }
    ts.open(spec, dtype=ts.dtype(dtype.name), create=True).result()
