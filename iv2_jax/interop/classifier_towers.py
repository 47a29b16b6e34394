"""What a classifier takes from weights of any origin, to be fine-tuned or probed (spec stage1 6.5).

Strict, as `tower_recipes`: the original loads what fits and only prints what does not (trap 8).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop.position_files import file_grid, fit_positions
from iv2_jax.interop.sources import WeightSource
from iv2_jax.interop.taking import ENCODER_FIELDS, Taken, by, check_same, encoder_of, read_table
from iv2_jax.interop.tensor_file import TensorRef
from iv2_jax.interop.torch_keys import HEADS, encoder_map
from iv2_jax.interop.torch_keys.classifier import classifier_map
from iv2_jax.models.classifier import ClassifierConfig

_VISION = "vision_encoder"
FIRST, FRESH = "first", "fresh"
_LAST = ("head.weight", "head.bias")


def vision(source: WeightSource, config: ClassifierConfig, *, frames: int = 0) -> Taken:
    """The encoder of a student, a classifier, a stage-2 or CLIP model; the head stays fresh.

    Positions are interpolated to the classifier's frames and pictures.

    Args:
        source: opened weights; keys bare or under `vision_encoder.`.
        config: the classifier.
        frames: frames of the clips that a file's positions are of; 0 finds them.

    Returns:
        The filled parameters under `encoder/`.

    Raises:
        CheckpointError: the encoders do not fit, or something is left over.
        ConfigError: a source of ours has another encoder than `config` says.
    """
    tensors, others = source.under(f"{_VISION}.")
    tensors, notes = _fitted(source, tensors, config, frames)
    if others:
        notes = (*notes, f"{others} keys outside of {_VISION}. left out")
    table = encoder_map(config.encoder, path_prefix="encoder/")
    flat = read_table(tensors, table, HEADS | {"temp": "temperature"}, source)
    return Taken(flat, {}, notes)


def whole(
    source: WeightSource, config: ClassifierConfig, *, frames: int = 0, rows: str = ""
) -> Taken:
    """A classifier with its head, to go on from: K710 to K400, 8 to 16 frames.

    Args:
        source: opened weights.
        config: the classifier.
        frames: as in `vision`.
        rows: which classes of the source's last map are taken, see `TowerInit.rows`.

    Returns:
        The filled parameters.

    Raises:
        CheckpointError: something is missing, left over or of another shape; a number of classes
            that differs without `rows`, too.
        ConfigError: `rows` do not fit, or a source of ours has another encoder.
    """
    tensors, notes = _fitted(source, source.tensors, config, frames)
    table = classifier_map(config)
    if "head.weight" not in tensors:
        raise CheckpointError(
            f"{source.path} has no classes (no head.weight): take tower 'vision', which leaves the "
            "head fresh"
        )
    classes = tensors["head.weight"].shape[0]
    if rows == FRESH:
        tensors = {key: value for key, value in tensors.items() if key not in _LAST}
        table = [entry for entry in table if entry.torch_keys[0] not in _LAST]
        fresh = dict.fromkeys(("head/kernel", "head/bias"), "rows='fresh'")
        return Taken(read_table(tensors, table, {}, source), fresh, notes)
    if rows:
        chosen = _rows(rows, config.num_classes, classes)
        tensors = {k: _select(v, chosen) if k in _LAST else v for k, v in tensors.items()}
        notes = (*notes, f"{len(chosen)} of {classes} classes ({rows})")
    elif classes != config.num_classes:
        raise CheckpointError(
            f"{source.path} has {classes} classes, the model {config.num_classes}: set `rows` of "
            f"this init to {FIRST!r} (Kinetics-400 of K710), to a JSON list of the row of each "
            f"class, or to {FRESH!r} for a new last map"
        )
    return Taken(read_table(tensors, table, {}, source), {}, notes)


def _fitted(
    source: WeightSource, tensors: Mapping[str, Any], config: ClassifierConfig, frames: int
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The tensors with positions of the classifier's clip, and a note if they were others."""
    known, encoder = encoder_of(source.config), config.encoder
    if known is not None:
        check_same(known, encoder, ENCODER_FIELDS, "vision", source)
        frames = known.num_frames
    grid = file_grid(tensors, encoder, frames=frames)
    tensors = fit_positions(tensors, encoder, frames=frames)
    if grid in (None, encoder.grid):
        return tensors, ()
    return tensors, (f"positions {by(grid)} -> {by(encoder.grid)} patches",)


def _rows(rows: str, wanted: int, classes: int) -> np.ndarray:
    """The source's row of each class."""
    if rows == FIRST:
        chosen: Any = list(range(wanted))
    else:
        try:
            chosen = json.loads(Path(rows).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"init: rows={rows!r} must be {FIRST!r}, {FRESH!r} or a JSON file: {error}"
            ) from None
    numbers = isinstance(chosen, list) and all(isinstance(row, int) for row in chosen)
    if not numbers or len(chosen) != wanted:
        raise ConfigError(f"init: rows={rows!r} must list a row for each of {wanted} classes")
    outside = [row for row in chosen if not 0 <= row < classes]
    if outside:
        raise ConfigError(
            f"init: rows={rows!r}: {outside[:5]} are no rows of a head of {classes} classes"
        )
    return np.asarray(chosen)


def _select(tensor: Any, rows: np.ndarray) -> Any:
    """Some rows of a tensor, read when asked for."""
    shape = (len(rows), *tensor.shape[1:])
    if isinstance(tensor, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, tensor.dtype)
    return TensorRef(shape, np.dtype(tensor.dtype), lambda: np.asarray(tensor)[rows])
