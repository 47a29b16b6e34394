"""Reads PyTorch weights: one file, many shards, or a DeepSpeed folder; strict."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.errors import CheckpointError
from iv2_jax.interop import entries as entries_lib
from iv2_jax.interop import gguf_file, pickled_file, safetensors_file, shards
from iv2_jax.interop.pickled_file import WRAPPERS
from iv2_jax.interop.tensor_file import TensorFile, TensorRef

__all__ = ["WRAPPERS", "TensorFile", "TensorRef", "load_params", "open_tensors", "save_checkpoint"]

logger = logging.getLogger(__name__)


def open_tensors(path: str | Path, *, wrapper: str | None = None) -> TensorFile:
    """Opens weights.

    Args:
        path: `.safetensors`; `.gguf`; a `.pt`, `.pth` or `.bin` that `torch.save` wrote (a flat
            dict of tensors, or one with such a dict under `module` or `model`, as DeepSpeed's
            `mp_rank_00_model_states.pt` has); a sharded index (`*.index.json`); or a folder with
            an index, shards or a DeepSpeed checkpoint.
        wrapper: key to take the weights from; None takes a flat dict or the first of `WRAPPERS`
            there is, and logs which.

    Returns:
        The tensors; values are read when asked for.

    Raises:
        CheckpointError: the file is missing, of another kind, damaged, or has no weights.
    """
    path = Path(path)
    open_one = partial(_open_file, wrapper=wrapper)
    if path.is_dir():
        return shards.open_folder(path, open_one)
    if not path.is_file():
        raise CheckpointError(f"no weight file {path}")
    if path.name.endswith(shards.INDEX_ENDING):
        return shards.open_index(path, open_one)
    return open_one(path)


def load_params(
    path: str | Path,
    entries: Sequence[entries_lib.Entry],
    *,
    ignore: Mapping[str, str] | None = None,
    prefix: str = "",
    wrapper: str | None = None,
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """Reads weights of the original into our parameters; strict.

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
    tensors = select(open_tensors(path, wrapper=wrapper), prefix)
    return entries_lib.from_torch(tensors, entries, ignore=ignore, dtype=dtype, source=str(path))


def select(tensors: TensorFile, prefix: str) -> TensorFile:
    """Keeps the keys that start with `prefix`, takes it off and logs how many are left out.

    Raises:
        CheckpointError: no key starts with it.
    """
    if not prefix:
        return tensors
    left = sum(not key.startswith(prefix) for key in tensors)
    kept = tensors.select(prefix)
    if left:
        logger.info("%s: left out %d keys that do not start with %r", tensors.path, left, prefix)
    return kept


def _open_file(path: Path, wrapper: str | None) -> TensorFile:
    """Opens one weight file by its ending."""
    if path.suffix == safetensors_file.ENDING:
        return TensorFile(path, safetensors_file.open_safetensors(path))
    if path.suffix == gguf_file.ENDING:
        return gguf_file.open_gguf(path)
    if path.suffix in pickled_file.ENDINGS:
        return pickled_file.open_pickled(path, wrapper)
    endings = (
        safetensors_file.ENDING,
        gguf_file.ENDING,
        *pickled_file.ENDINGS,
        shards.INDEX_ENDING,
    )
    raise CheckpointError(f"{path}: the ending {path.suffix!r} is none of {', '.join(endings)}")


def save_checkpoint(
    params: Mapping[str, Any], config: Any, folder: str | Path, *, source: str
) -> Path:
    """Writes parameters as a checkpoint that `train`, `eval` and `export` take.

    Args:
        params: the model's parameters.
        config: its config, of any kind.
        folder: workdir to make; the checkpoint is its step 0.
        source: where the weights come from, kept in the checkpoint's config.

    Returns:
        The folder.

    Raises:
        CheckpointError: there is a checkpoint already, or the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    from iv2_jax.interop import run_config
    from iv2_jax.train import checkpoint

    folder = Path(folder)
    steps = folder / checkpoint.FOLDER
    if steps.exists() and any(steps.iterdir()):
        raise CheckpointError(f"{steps} is not empty; name another folder")
    checkpoint.check_writable(folder)
    if run_config.params_prefix(config):
        params = {run_config.params_prefix(config).rstrip("/"): params}
    with ocp.CheckpointManager(steps.absolute()) as manager:
        items = {
            "params": ocp.args.StandardSave(dict(params)),
            "config": ocp.args.JsonSave(run_config.of_model(config, source)),
        }
        manager.save(0, args=ocp.args.Composite(**items))
    return folder
