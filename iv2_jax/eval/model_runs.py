"""Two-tower models for evaluation: of runs, imported checkpoints and exported folders."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import meta

from iv2_jax import config as config_lib
from iv2_jax.data.modalities import WITH_SOUND, AudioConfig, TextConfig
from iv2_jax.data.pipeline import DataConfig
from iv2_jax.errors import ConfigError, nearest
from iv2_jax.eval.retrieval_towers import ModelConfig
from iv2_jax.models import kinds
from iv2_jax.models.clip import ClipConfig, SmallClipConfig
from iv2_jax.models.stage2 import Stage2Config
from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train.stage import STAGES, config_class

_MODELS = (Stage2Config, ClipConfig, SmallClipConfig)


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A model under a name for tables.

    Attributes:
      name: Where it comes from.
      params: Host arrays.
      config: Its shape.
      seed: Of its run.
      trained: False for weights as a run starts with them.
      data: How its run reads held-out clips, or None.
    """

    name: str
    params: Any
    config: ModelConfig
    seed: int
    trained: bool
    data: DataConfig | None


def load_model(path: str, *, ema: bool = False) -> EvaluatedModel:
    """Reads a run, an imported checkpoint or an exported folder.

    Raises:
      CheckpointError: There is none at `path`, or it cannot be read.
      ConfigError: It is no stage-2 or CLIP model.
    """
    from iv2_jax.interop import importing, run_config

    if run_config.is_exported(Path(path)):
        params, config = importing.read_exported_model(path)
        return EvaluatedModel(path, params, _checked(config, path), 0, True, None)
    params, values = checkpoint_lib.load_params(path, ema=ema)
    run = _run_of(values)
    config = run_config.read_run(values) if run is None else _model_of(run, path)
    data = None if run is None else _data_of(run)
    return EvaluatedModel(path, params, _checked(config, path), values.get("seed", 0), True, data)


def at_step_0(path: str) -> EvaluatedModel:
    """The weights that the run of a checkpoint started with: fresh ones, and the towers it loaded.

    Raises:
      CheckpointError: There is no checkpoint at `path`, or a tower's file is gone.
      ConfigError: It is no stage-2 or CLIP model.
    """
    from iv2_jax.interop import run_config
    from iv2_jax.train import starting

    if run_config.is_exported(Path(path)):
        raise ConfigError(f"{path} is an exported folder: it does not say what its run began with")
    _, values = checkpoint_lib.load_params(path)
    run, seed = _run_of(values), values.get("seed", 0)
    if run is None:
        config = _checked(run_config.read_run(values), path)
        params = fresh_params(config, seed)
        return EvaluatedModel(f"fresh weights, seed {seed}", params, config, seed, False, None)
    stage, config = run.make_stage(), _checked(_model_of(run, path), path)
    params = meta.unbox(jax.jit(stage.init_params)(jax.random.key(seed)))
    params = jax.device_get(starting.lay_over(params, stage.starting_params()))
    name = f"step 0 of {path}"
    return EvaluatedModel(name, params, config, seed, False, _data_of(run))


def fresh_params(config: ModelConfig, seed: int) -> Any:
    """Parameters of a model as initialised, on the host."""
    init = jax.jit(functools.partial(kinds.of(config).init_params, config))
    return jax.device_get(meta.unbox(init(jax.random.key(seed))))


def evaluation_set(
    model: EvaluatedModel,
    *,
    source: str | None = None,
    format: str = "auto",
    prefix: str = "",
    split: str | None = None,
    media: str | None = None,
    tokenizer: str | None = None,
    max_length: int | None = None,
    captions: Sequence[str] = (),
    join: bool | None = None,
) -> DataConfig:
    """How to read clips and captions for a model: as its run does, with what is given on top.

    Args:
      model: Whose run's `eval_data` is taken; else four centre frames as the original's evaluation.
      source: Manifest or packed set; None keeps the run's.
      format: Of the manifest, when `source` is given.
      prefix: Of its paths, when `source` is given.
      split: None keeps the run's; empty takes all clips.
      media: What is looked for; None keeps the run's.
      tokenizer: `KIND:PATH`; None keeps the run's.
      max_length: Token ids of a text; None keeps the run's (the original's evaluations have
        lengths of their own, 32 as a rule: spec stage2 11.9).
      captions: Names of captions; empty keeps the run's.
      join: One paragraph of all captions of a clip; None keeps the run's choice.

    Raises:
      ConfigError: The run says nothing of what is not given.
    """
    data = model.data
    if data is None:
        data = _released_data(model.config)
    if source is not None:
        data = dataclasses.replace(
            data, source=source, format=format, prefix=prefix, corpora=(), targets=""
        )
    if not data.source and not data.corpora:
        raise ConfigError(f"{model.name} names no held-out clips: give --data")
    if split is not None:
        data = dataclasses.replace(data, split=split or None)
    if media is not None:
        audio = (data.audio or AudioConfig()) if media in WITH_SOUND else None
        data = dataclasses.replace(data, media=media, audio=audio)
    return dataclasses.replace(
        data, text=_text(data.text, tokenizer, max_length, captions, join, model.name)
    )


def _text(
    text: TextConfig | None,
    tokenizer: str | None,
    max_length: int | None,
    captions: Sequence[str],
    join: bool | None,
    name: str,
) -> TextConfig:
    """The run's text config with what is given on top."""
    if tokenizer is not None:
        kind, _, path = tokenizer.partition(":")
        text = dataclasses.replace(text or TextConfig(), tokenizer=kind, path=path, options={})
    if text is None:
        raise ConfigError(
            f"{name} does not say how texts become tokens: give --tokenizer KIND:PATH, such as "
            "bert:vocab.txt"
        )
    changes: dict[str, Any] = {}
    if max_length is not None:
        changes["max_length"] = max_length
    if captions:
        changes["captions"] = tuple(captions)
    if join is not None:
        changes["choice"] = "join" if join else "random"
    return dataclasses.replace(text, **changes)


def _released_data(config: ModelConfig) -> DataConfig:
    """The frames of the original's evaluation: from the middle, stretched to a square."""
    vision = config.vision.encoder if isinstance(config, Stage2Config) else config.vision
    return DataConfig(
        num_frames=vision.num_frames,
        size=vision.image_size,
        sampling="middle",
        augment="stretch",
        eval=True,
    )


def _run_of(values: Mapping[str, Any]) -> Any:
    """The run's config, or None for a checkpoint that no run of ours made."""
    stage = values.get("stage")
    if stage not in STAGES:
        return None
    return config_lib.build(config_class(stage), values)


def _model_of(run: Any, path: str) -> Any:
    """The model in a run's config."""
    found = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    for value in found.values():
        if isinstance(value, _MODELS):
            return value
    raise ConfigError(
        f"{path} is a run of stage {run.stage!r}, which has no stage-2 or CLIP model; its encoder "
        "can be probed (--task probe)"
    )


def _checked(config: Any, path: str) -> ModelConfig:
    """Refuses other kinds of model."""
    if not isinstance(config, _MODELS):
        raise ConfigError(
            f"{path} holds a model of kind {kinds.of(config).name!r}; this task needs stage2, clip "
            "or clip_small"
        )
    return config


def _data_of(run: Any) -> DataConfig | None:
    """How a run reads held-out clips; its training clips where it names none."""
    data = run.eval_data if run.eval_data is not None else run.data
    if isinstance(data, DataConfig):
        return data
    media = getattr(data, "media", {})
    for name in ("video", "audio_video", "image", "audio"):
        if name in media:
            return media[name]
    raise ConfigError(f"the run's data has no media to look for{nearest('video', media)}")


def as_rows(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """`{kind/name: value}` as kind -> name -> value; names without a kind under an empty one."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        kind, _, rest = name.rpartition("/")
        rows.setdefault(kind, {})[rest] = float(np.round(value, 4))
    return rows
