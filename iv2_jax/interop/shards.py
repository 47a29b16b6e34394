"""Weights in many files: sharded indexes, folders of shards, DeepSpeed checkpoints."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from iv2_jax.errors import CheckpointError
from iv2_jax.interop import pickled_file, safetensors_file
from iv2_jax.interop.tensor_file import TensorFile, TensorRef, sample

logger = logging.getLogger(__name__)

INDEX_ENDING = ".index.json"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

_DEEPSPEED = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_ZERO = re.compile(r"(zero_pp_rank_\d+_)+mp_rank_\d+_model_states\.pt")
_TAG = "latest"  # file in which DeepSpeed names its newest subfolder

OpenOne = Callable[[Path], TensorFile]


def open_folder(folder: Path, open_one: OpenOne) -> TensorFile:
    """Opens a folder of weights.

    Asked in this order: DeepSpeed states (in the folder or in the subfolder that `latest` names),
    a sharded index, one kind of weight files.

    Args:
        folder: the folder.
        open_one: opens one weight file.

    Returns:
        The tensors of all shards.

    Raises:
        CheckpointError: there are no weights, or the shards contradict each other or their index.
    """
    states = _deepspeed_states(folder)
    if states is not None:
        return open_one(states)
    indexes = [folder / name for name in INDEXES if (folder / name).is_file()]
    if indexes:
        return open_index(indexes[0], open_one)
    for ending in (safetensors_file.ENDING, *pickled_file.ENDINGS):
        shards = sorted(folder.glob(f"*{ending}"))
        if shards:
            logger.info("%s: %d files %s", folder, len(shards), f"*{ending}")
            return _merged(folder, shards, open_one)
    raise CheckpointError(
        f"{folder} has no weights: neither {' nor '.join(INDEXES)}, nor files of "
        f"{', '.join((safetensors_file.ENDING, *pickled_file.ENDINGS))}; "
        f"it has {sample(sorted(path.name for path in folder.iterdir()))}"
    )


def open_index(index: Path, open_one: OpenOne) -> TensorFile:
    """Opens the shards that an index names.

    Args:
        index: a `*.index.json` with `weight_map`, `{key: file name}`.
        open_one: opens one weight file.

    Returns:
        The tensors of all shards.

    Raises:
        CheckpointError: the index is no such file, a shard is missing, or shards hold other keys
            than the index says.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no sharded index: it has no weight_map") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names {name!r}, which is not a file beside it")
    lost = [name for name in names if not (index.parent / name).is_file()]
    if lost:
        raise CheckpointError(f"{index}: {len(lost)} of {len(names)} shards miss: {sample(lost)}")
    opened = _merged(index.parent, [index.parent / name for name in names], open_one)
    absent = [key for key in weight_map if key not in opened]
    extra = [key for key in opened if key not in weight_map]
    if absent or extra:
        raise CheckpointError(
            f"{index} does not fit its shards: they lack {sample(absent)}, "
            f"they have beside it {sample(extra)}"
        )
    return opened


def _merged(folder: Path, shards: Iterable[Path], open_one: OpenOne) -> TensorFile:
    """The tensors of several files; a key may stand in one only."""
    tensors: dict[str, TensorRef] = {}
    home: dict[str, str] = {}
    wrapper = None
    for shard in shards:
        opened = open_one(shard)
        wrapper = wrapper or opened.wrapper
        twice = [key for key in opened if key in home]
        if twice:
            raise CheckpointError(
                f"{folder}: {sample(twice)} in both {home[twice[0]]} and {shard.name}: these are "
                "not shards of one model; name one file"
            )
        tensors.update(opened)
        home.update(dict.fromkeys(opened, shard.name))
    return TensorFile(folder, tensors, wrapper)


def _deepspeed_states(folder: Path) -> Path | None:
    """The one file of a DeepSpeed checkpoint that holds the weights, or None if it is none."""
    tag = folder / _TAG
    if tag.is_file():
        name = tag.read_text(encoding="utf-8").strip()
        if Path(name).name != name or not (folder / name).is_dir():
            raise CheckpointError(f"{tag} names {name!r}, which is no folder beside it")
        folder = folder / name
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    states = [name for name in names if _DEEPSPEED.fullmatch(name)]
    if len(states) > 1:
        raise CheckpointError(
            f"{folder} holds {len(states)} tensor-parallel parts ({sample(states)}); merge them "
            "with DeepSpeed's own tools, or name one file if they are copies"
        )
    if states:
        return folder / states[0]
    if any(_ZERO.fullmatch(name) for name in names):
        raise CheckpointError(
            f"{folder} is a ZeRO-3 checkpoint, whose files hold slices without shapes; run the "
            "zero_to_fp32.py that DeepSpeed put beside it, and import what it writes"
        )
    return None
