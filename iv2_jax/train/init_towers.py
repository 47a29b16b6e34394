"""What the towers of a fine-tuning, stage-2, CLIP or stage-3 run start from.

A run lists `TowerInit`s; each names a tower and where its weights are. They are laid over the fresh
parameters in their order, so a later one wins where two fill the same parameter. What each took,
what it left out and what stays fresh is logged.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from flax import traverse_util

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import chat_towers, classifier_towers, tower_recipes
from iv2_jax.interop.sources import open_source
from iv2_jax.interop.taking import Taken
from iv2_jax.models import kinds
from iv2_jax.models.bridge_pretraining import BridgePretrainingConfig
from iv2_jax.models.chat import ChatConfig
from iv2_jax.models.classifier import ClassifierConfig

logger = logging.getLogger(__name__)

Model = tower_recipes.Model | ChatConfig | BridgePretrainingConfig | ClassifierConfig


@dataclasses.dataclass(frozen=True)
class TowerInit:
    """Where weights of a model come from.

    Attributes:
        tower: "vision", "text" or "audio"; "model" for a whole model of the same kind (going on
            with it, or with other frames); "overlay" for any part of one, such as a released CLIP
            delta or the original's `extra_ckpt_path`. A chat model has "vision", "bridge" (a chat
            model's or its Q-Former's own file or run, or BERT's layout), "llm" (also a GGUF file
            or a llama2.c `.bin`) and "model"; a Q-Former's pretraining has the first two and
            "model". A classifier has "vision", which leaves its head fresh, and "model".
        path: a run of ours, a folder that `iv2 export` wrote, a PyTorch file (`.pt`, `.pth`,
            `.bin`, `.safetensors`, GGUF), a folder of shards, of DeepSpeed or of transformers, or
            `package:NAME/file` in an installed package.
        frames: frames of the clips that a file's positions are of; 0 finds them out, for pictures
            of the model's size.
        wrapper: key the weights stand under in a pickled file; "" finds it.
        ema: of a run of ours: its moving average.
        rows: of a classifier's "model": which rows of its last map are this one's classes: "first"
            takes the first ones (Kinetics-400 of K710), "fresh" none, a JSON file lists the row of
            each class; empty needs equal numbers of classes.
    """

    tower: Literal["vision", "text", "audio", "model", "overlay", "llm", "bridge"]
    path: str
    frames: int = 0
    wrapper: str = ""
    ema: bool = False
    rows: str = ""

    def __post_init__(self) -> None:
        if self.rows and self.tower != "model":
            raise ConfigError(f"towers: rows belongs to tower 'model', not to {self.tower!r}")
        if not self.path:
            raise ConfigError(f"towers: the {self.tower} tower's path is empty")
        if self.frames < 0:
            raise ConfigError(f"towers: frames must be >= 0, not {self.frames}")


@dataclasses.dataclass(frozen=True)
class Assembly:
    """Starting weights of a model.

    Attributes:
        params: nested host arrays, a part of the model's tree, in the model's dtypes.
        lines: what came from where, for people.
    """

    params: dict[str, Any]
    lines: tuple[str, ...]


def load_towers(inits: Sequence[TowerInit], config: Model) -> dict[str, Any]:
    """Reads the weights that a model starts from, and logs what came from where.

    Args:
        inits: where from, in the order in which they are laid over each other.
        config: the model's config.

    Returns:
        Nested dict of host arrays: the part of the model's parameters that is filled.

    Raises:
        UserError: weights are not there, cannot be read or do not fit.
    """
    assembly = assemble(inits, config)
    for line in assembly.lines:
        logger.info("%s", line)
    return assembly.params


def assemble(inits: Sequence[TowerInit], config: Model) -> Assembly:
    """`load_towers` with its report; arguments and errors as there."""
    wanted = traverse_util.flatten_dict(kinds.of(config).abstract_params(config), sep="/")
    filled: dict[str, np.ndarray] = {}
    why: dict[str, str] = {}
    lines = []
    for init in inits:
        taken = _take(init, config)
        for path, value in taken.params.items():
            if path not in wanted or wanted[path].shape != value.shape:
                raise CheckpointError(
                    f"{init.path}: {path} of shape {value.shape} is none of the model's"
                )
            filled[path] = np.asarray(value, wanted[path].dtype)
        why |= taken.fresh
        lines.append(_line(init, taken))
    if inits:
        lines.append(_fresh_line([path for path in wanted if path not in filled], wanted, why))
    return Assembly(traverse_util.unflatten_dict(filled, sep="/"), tuple(lines))


def _take(init: TowerInit, config: Model) -> Taken:
    """What one init gives."""
    if init.rows and not isinstance(config, ClassifierConfig):
        raise ConfigError("init: rows are of a classifier's last map, this model has none")
    if isinstance(config, ChatConfig):
        return _take_chat(init, config)
    if isinstance(config, BridgePretrainingConfig):
        return _take_pretraining(init, config)
    if isinstance(config, ClassifierConfig):
        return _take_classifier(init, config)
    if init.tower in ("llm", "bridge"):
        raise ConfigError(f"init: tower {init.tower!r} is a chat model's, this model has none")
    source = open_source(init.path, wrapper=init.wrapper, ema=init.ema)
    if init.tower == "vision":
        return tower_recipes.vision_tower(source, config, frames=init.frames)
    if init.tower == "text":
        return tower_recipes.text_tower(source, config)
    if init.tower == "audio":
        return tower_recipes.audio_tower(source, config)
    return tower_recipes.whole_model(
        source, config, frames=init.frames, partial=init.tower == "overlay"
    )


def _take_chat(init: TowerInit, config: ChatConfig) -> Taken:
    """What one init gives to a chat model."""
    if init.tower == "llm" and chat_towers.is_plain_llm(init.path):
        return chat_towers.plain_llm(init.path, config)
    recipes = {
        "vision": functools.partial(chat_towers.vision, frames=init.frames),
        "llm": chat_towers.llm_of_chat,
        "bridge": chat_towers.bridge,
        "model": chat_towers.whole_chat,
    }
    if init.tower not in recipes:
        raise ConfigError(
            f"init: a chat model has no tower {init.tower!r}: choose one of {', '.join(recipes)}"
        )
    source = open_source(init.path, wrapper=init.wrapper, ema=init.ema)
    return recipes[init.tower](source, config)


def _take_classifier(init: TowerInit, config: ClassifierConfig) -> Taken:
    """What one init gives to a classifier."""
    if init.tower not in ("vision", "model"):
        raise ConfigError(f"init: a classifier has no tower {init.tower!r}: 'vision' or 'model'")
    source = open_source(init.path, wrapper=init.wrapper, ema=init.ema)
    if init.tower == "vision":
        return classifier_towers.vision(source, config, frames=init.frames)
    return classifier_towers.whole(source, config, frames=init.frames, rows=init.rows)


def _take_pretraining(init: TowerInit, config: BridgePretrainingConfig) -> Taken:
    """What one init gives to a Q-Former's pretraining."""
    recipes = {
        "vision": functools.partial(chat_towers.vision, frames=init.frames),
        "bridge": chat_towers.bridge_to_pretrain,
        "model": chat_towers.whole_pretraining,
    }
    if init.tower not in recipes:
        raise ConfigError(
            f"init: a Q-Former's pretraining has no tower {init.tower!r}: choose one of "
            f"{', '.join(recipes)}"
        )
    return recipes[init.tower](open_source(init.path, wrapper=init.wrapper, ema=init.ema), config)


def _line(init: TowerInit, taken: Taken) -> str:
    """One line on what an init gave."""
    values = sum(value.size for value in taken.params.values())
    text = f"{init.tower} <- {init.path}: {len(taken.params)} arrays, {values:,} values"
    # Stacks that are filled in part: by stack and slices, not by parameter.
    partly = {
        f"{'/'.join(path.split('/')[:2])}{path[path.index('[') :]} drawn anew ({reason})": None
        for path, reason in taken.fresh.items()
        if path.endswith(":]")
    }
    return "; ".join([text, *taken.notes, *partly])


def _fresh_line(paths: Sequence[str], wanted: dict[str, Any], why: dict[str, str]) -> str:
    """One line on what stays fresh, by parts of the model and reasons."""
    if not paths:
        return "fresh: nothing"
    groups: Counter[tuple[str, str]] = Counter()
    for path in paths:
        names = path.split("/")
        groups["/".join(names[:2]) if len(names) > 2 else path, why.get(path, "")] += 1
    values = sum(wanted[path].size for path in paths)
    parts = [
        f"{part} x{count}{f' ({reason})' if reason else ''}"
        for (part, reason), count in groups.items()
    ]
    return f"fresh: {values:,} values: {', '.join(parts)}"
