"""Opens weights of any origin under the original's key names, so that one recipe serves them all.

A run of ours, a folder that `iv2 export` wrote, a PyTorch file, shards, a DeepSpeed folder or a
folder of transformers: each gives `{torch key: tensor}` and, where the origin says it, the config
of the model. Values are read when asked for.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from flax.core import meta

from iv2_jax import storage
from iv2_jax.errors import CheckpointError
from iv2_jax.interop import families, load, pickled_file, run_config, safetensors_file
from iv2_jax.interop.entries import Entry, parameters
from iv2_jax.interop.fitting import check
from iv2_jax.interop.tensor_file import TensorRef

logger = logging.getLogger(__name__)

PACKAGE = "package:"
WEIGHT_ENDINGS = (safetensors_file.ENDING, *pickled_file.ENDINGS)


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Opened weights.

    Attributes:
        path: what was opened; messages name it.
        tensors: `{torch key: tensor}`, read when asked for.
        config: config of the whole model, where the source says it (ours do), else None.
        described: contents of the `config.json` of transformers beside the weights, else empty.
    """

    path: Path
    tensors: Mapping[str, Any]
    config: Any = None
    described: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def under(self, prefix: str) -> tuple[dict[str, Any], int]:
        """The tensors of a tower, and how many others there are.

        Args:
            prefix: of the tower's keys in a whole model, such as `vision_encoder.`.

        Returns:
            The tensors whose keys start with it, taken off; all of them if none does.
        """
        kept = {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }
        if not kept:
            return dict(self.tensors), 0
        return kept, len(self.tensors) - len(kept)


def open_source(path: str, *, wrapper: str = "", ema: bool = False) -> WeightSource:
    """Opens weights.

    Args:
        path: a workdir (or its `checkpoints` folder, or one step folder), a folder that
            `iv2 export` wrote, whatever `load.open_tensors` opens, or `package:NAME/relative/file`
            for a file or folder inside an installed package.
        wrapper: key the weights stand under in a pickled file; "" finds it.
        ema: of a run: its moving average instead of its parameters.

    Returns:
        The source.

    Raises:
        CheckpointError: nothing is there, or it cannot be read.
        DataError: the package is not installed, or has no such file.
    """
    place = _in_package(path) if path.startswith(PACKAGE) else storage.path(path)
    if _is_checkpoint(place):
        return _open_checkpoint(place, ema)
    if ema:
        raise CheckpointError(f"ema=True, but {place} is no run of ours")
    if run_config.is_exported(place):
        config = run_config.read_exported(place)
        tensors = load.open_tensors(run_config.exported_weights(place))
        return WeightSource(place, tensors, config)
    tensors = load.open_tensors(place, wrapper=wrapper or None)
    return WeightSource(place, tensors, described=_described(place))


def as_tensors(params: Mapping[str, Any], entries: Iterable[Entry]) -> dict[str, TensorRef]:
    """Parameters of ours under the original's names; each is turned around when it is read.

    Args:
        params: the model's parameters.
        entries: its entries.

    Returns:
        `{torch key: tensor}`, without copies of tied tensors and without buffers.

    Raises:
        CheckpointError: the parameters do not fit.
    """
    entries = parameters(entries)
    params = meta.unbox(dict(params))
    check(params, entries, "the checkpoint")
    flat = traverse_util.flatten_dict(params, sep="/")
    out = {}
    for entry in entries:
        array = np.asarray(flat[entry.path])
        slices = array if entry.stacked else array[None]
        for key, part in zip(entry.torch_keys, slices, strict=True):
            dtype = np.dtype(entry.torch_dtype or array.dtype)
            out[key] = TensorRef(entry.torch_shape, dtype, _Turned(entry, part, dtype))
    return out


@dataclasses.dataclass(frozen=True)
class _Turned:
    """Reads one slice of a parameter in the layout of its torch tensor."""

    entry: Entry
    part: np.ndarray
    dtype: np.dtype

    def __call__(self) -> np.ndarray:
        turned = self.part.transpose(self.entry.permutation)
        return np.asarray(turned.reshape(self.entry.torch_shape), self.dtype)


def _in_package(path: str) -> Path:
    """What a `package:` name means; a folder with one weight file somewhere in it is that file."""
    from iv2_jax.data import package_files

    place = Path(package_files.resolve(path))
    if place.is_dir():
        files = [f for f in sorted(place.rglob("*")) if f.suffix in WEIGHT_ENDINGS]
        if len(files) == 1:
            return files[0]
    return place


def _is_checkpoint(path: Path) -> bool:
    """Whether it is a workdir of ours, its checkpoints, or one of them."""
    from iv2_jax.train import checkpoint

    return (
        (path / checkpoint.FOLDER).is_dir()
        or (path.name.isdigit() and (path / "params").is_dir())
        or (path.name == checkpoint.FOLDER and path.is_dir())
    )


def _open_checkpoint(path: Path, ema: bool) -> WeightSource:
    """Opens a run of ours."""
    from iv2_jax.train import checkpoint

    params, values = checkpoint.load_params(path, ema=ema)
    config = run_config.read_run(values)
    return WeightSource(path, as_tensors(params, families.of(config).entries(config)), config)


def _described(path: Path) -> dict[str, Any]:
    """The config.json of transformers in a folder of weights, or beside a file of them."""
    file = (path if path.is_dir() else path.parent) / run_config.CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("%s is not used, it is no JSON (%s)", file, error)
        return {}
    return contents if isinstance(contents, dict) and "model_type" in contents else {}
