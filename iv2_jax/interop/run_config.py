"""Which model a checkpoint or an exported folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iv2_jax import config as config_lib
from iv2_jax.errors import CheckpointError
from iv2_jax.models import kinds
from iv2_jax.models.student import StudentConfig
from iv2_jax.models.video_encoder import EncoderConfig

CONFIG_FILE = "config.json"
_FORMAT = "iv2_jax"


def of_model(config: Any, source: str) -> dict[str, Any]:
    """What is kept as the config of a checkpoint that no run of ours made.

    Args:
        config: the model's config. An encoder is kept as a student without alignments, which is
            what `iv2 train` and `iv2 eval` take.
        source: where the weights come from.
    """
    if isinstance(config, EncoderConfig):
        config = bare_student(config)
    if isinstance(config, StudentConfig):
        return {"student": config_lib.to_dict(config), "imported_from": source}
    model = {"kind": kinds.of(config).name, "config": config_lib.to_dict(config)}
    return {"model": model, "imported_from": source}


def params_prefix(config: Any) -> str:
    """Where the parameters of a config stand in the checkpoint that `of_model` describes."""
    return "encoder/" if isinstance(config, EncoderConfig) else ""


def bare_student(encoder: EncoderConfig) -> StudentConfig:
    """A student that is its encoder."""
    return StudentConfig(encoder, clip=None, mae=None, final_width=0, final_decoder="linear")


def read_run(values: Mapping[str, Any]) -> Any:
    """The model's config in the config saved with a checkpoint.

    Args:
        values: plain values, as `train.checkpoint.load_params` returns them: with the model under
            `model` (kind and config), or under the name of its kind, such as `student`.

    Returns:
        A config of any kind of model.

    Raises:
        CheckpointError: no model is named.
        ConfigError: a field of it is unknown or wrong.
    """
    model = values.get("model")
    if isinstance(model, Mapping) and "kind" in model:
        return config_lib.build(
            kinds.get(model["kind"]).config_class, model["config"], path="config.model.config"
        )
    for name in kinds.KINDS:
        if isinstance(values.get(name), Mapping):
            cls = kinds.get(name).config_class
            return config_lib.build(cls, values[name], path=f"config.{name}")
    raise CheckpointError(
        f"the checkpoint's config names no model: neither `model`, nor `student` or another of "
        f"{', '.join(kinds.KINDS)}; it has {', '.join(sorted(values)) or 'nothing'}"
    )


def is_exported(folder: Path) -> bool:
    """Whether a folder's config.json was written by `iv2 export`."""
    path = folder / CONFIG_FILE
    return path.is_file() and read_json(path).get("format") == _FORMAT


def read_exported(folder: str | Path) -> Any:
    """Reads the model config of an exported folder.

    Raises:
        CheckpointError: the folder has no config.json that `iv2 export` wrote.
        ConfigError: a field of it is unknown or wrong.
    """
    path = Path(folder) / CONFIG_FILE
    contents = read_json(path)
    if contents.get("format") != _FORMAT or contents.get("kind") not in kinds.KINDS:
        raise CheckpointError(f"{path} was not written by `iv2 export`")
    cls = kinds.get(contents["kind"]).config_class
    return config_lib.build(cls, contents["model"], path=CONFIG_FILE)


def exported_weights(folder: str | Path) -> Path:
    """The weight file, or the index of shards, that the config.json of an exported folder names.

    Raises:
        CheckpointError: it names none in the folder.
    """
    path = Path(folder) / CONFIG_FILE
    name = read_json(path).get("weights")
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{path}: `weights` must name a file beside it, not {name!r}")
    return Path(folder) / name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: no such file, or no JSON object.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {path.parent}: not an exported folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, not an object")
    return contents
