"""Runs probes over checkpoints: reads clips once, encodes them with every encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax.core import meta
from tqdm import tqdm

from iv2_jax import config as config_lib
from iv2_jax.data.corpora import open_data
from iv2_jax.data.pipeline import DataConfig, make_loader, steps_in_pass
from iv2_jax.data.records import Clip
from iv2_jax.data.sources import ClipSource
from iv2_jax.errors import ConfigError, DataError
from iv2_jax.eval import probe
from iv2_jax.eval.features import extract
from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder
from iv2_jax.train import checkpoint as checkpoint_lib


@dataclass(frozen=True)
class Encoder:
    """An encoder's weights and shape under a name for tables."""

    name: str
    params: Mapping[str, Any]
    config: EncoderConfig
    seed: int
    trained: bool


@dataclass
class Evaluation:
    """Probe results and what they were computed from.

    Attributes:
      tasks: Probed labels.
      rows: One per encoder and label: encoder, label, trained, seed, linear, knn, …
      clips: split -> its clips.
      features: encoder name -> split -> features.
    """

    tasks: list[probe.Task]
    rows: list[dict[str, Any]]
    clips: dict[str, list[Clip]]
    features: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The table with its labels, without predictions and features."""
        rows = [{k: v for k, v in row.items() if k != "predictions"} for row in self.rows]
        labels = {
            t.label: {
                "classes": list(t.classes),
                "train_clips": len(t.train.rows),
                "test_clips": len(t.test.rows),
                "majority": t.majority,
                "left_out": t.left_out,
            }
            for t in self.tasks
        }
        return {"labels": labels, "rows": rows}

    def feature_arrays(self) -> dict[str, np.ndarray]:
        """Flat names `encoder/split/kind` -> array, and `split/id`, for an .npz."""
        arrays = {
            f"{name}/{split}/{kind}": values
            for name, splits in self.features.items()
            for split, kinds in splits.items()
            for kind, values in kinds.items()
        }
        ids = {
            f"{split}/id": np.asarray([c.id for c in clips]) for split, clips in self.clips.items()
        }
        return arrays | ids


# Field of a run's config that holds the encoder's shape, by the stage that wrote it.
_MODEL_FIELDS = {"distill": "student", "classify": "classifier"}


def encoder_of(params: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Any, EncoderConfig]:
    """The video encoder inside a run's parameters, and its shape from the run's config.

    Raises:
      ConfigError: The run's stage is not one whose encoder is probed.
    """
    name = _MODEL_FIELDS.get(config.get("stage", ""))
    if name is None:
        raise ConfigError(
            f"stage {config.get('stage')!r}: the probe reads encoders of runs of "
            f"{' and '.join(_MODEL_FIELDS)}; see `iv2 eval --help` for the tasks of others"
        )
    shape = config_lib.build(EncoderConfig, config[name]["encoder"], f"config.{name}.encoder")
    return params["encoder"], shape


def random_encoder(config: EncoderConfig, seed: int) -> Any:
    """Parameters of an encoder as initialised."""
    video = np.zeros((1, config.num_frames, config.image_size, config.image_size, 3), np.float32)
    init = jax.jit(VideoEncoder(config).init)
    return meta.unbox(init(jax.random.key(seed), video)["params"])


def evaluate(
    checkpoints: Sequence[str],
    *,
    data: str | None = None,
    labels: Sequence[str] | None = None,
    splits: tuple[str, str] = ("train", "test"),
    batch_size: int = 16,
    random: bool = True,
) -> Evaluation:
    """Probes the encoder of each checkpoint, and of as many random ones.

    Args:
      checkpoints: Workdirs or step folders; all of one frame count and resolution.
      data: Manifest or packed set; default the one the first run trained on.
      labels: Which labels; default every one that can be probed.
      splits: Names of the training and the held-out split.
      batch_size: Clips a forward pass.
      random: Also probe random weights, with each checkpoint's seed.

    Raises:
      UserError: A checkpoint, manifest or label that cannot be used.
    """
    encoders, data_config = _load(checkpoints, random)
    if data is not None:
        data_config = dataclasses.replace(data_config, source=data, format="auto", prefix="")
    sources = {split: open_split(data_config, split) for split in splits}
    clips = {split: list(source.clips) for split, source in sources.items()}
    names = labels or probe.label_names(clips[splits[0]], clips[splits[1]])
    if not names:
        raise DataError(f"{data_config.source} has no label with two classes in both splits")
    tasks = [probe.make_task(name, clips[splits[0]], clips[splits[1]]) for name in names]
    batches = {s: _read(data_config, s, batch_size, sources[s]) for s in splits}
    result = Evaluation(tasks, [], clips)
    for encoder in tqdm(encoders, desc="encoders", disable=None):
        features = {s: extract(encoder.params, encoder.config, batches[s]) for s in splits}
        result.features[encoder.name] = features
        for task in tasks:
            scores = probe.probe(task, features[splits[0]], features[splits[1]], seed=encoder.seed)
            about = {"trained": encoder.trained, "seed": encoder.seed}
            result.rows.append({"encoder": encoder.name, "label": task.label, **about, **scores})
    return result


def _load(checkpoints: Sequence[str], random: bool) -> tuple[list[Encoder], DataConfig]:
    """Encoders of the checkpoints and, if asked for, random twins; and how to read clips."""
    encoders, data_config = [], None
    for path in checkpoints:
        params, config = checkpoint_lib.load_params(path)
        weights, shape = encoder_of(params, config)
        seed = config["seed"]
        encoders.append(Encoder(str(path), weights, shape, seed, trained=True))
        if random:
            twin = random_encoder(shape, seed)
            encoders.append(Encoder(f"random weights, seed {seed}", twin, shape, seed, False))
        if data_config is None:
            data_config = _evaluation_data(config, shape)
    return encoders, data_config


def _evaluation_data(config: Mapping[str, Any], shape: EncoderConfig) -> DataConfig:
    """How to read clips for a probe: the encoder's frames, one centre view."""
    values = dict(config["eval_data"] or config["data"])
    values |= {"num_frames": shape.num_frames, "size": shape.image_size}
    return dataclasses.replace(
        config_lib.build(DataConfig, values, "config.data"), **evaluation_fields()
    )


def evaluation_fields() -> dict[str, Any]:
    """Fields of a DataConfig that reads every clip once, in order, from its centre."""
    return {"eval": True, "augment": "center", "mask": "none", "views": 1, "crops": 1}


def open_split(config: DataConfig, split: str | None) -> ClipSource:
    """The clips of one split of a data config's source."""
    return open_data(dataclasses.replace(config, split=split))


def _read(
    config: DataConfig, split: str, batch_size: int, source: ClipSource
) -> list[dict[str, np.ndarray]]:
    """All batches of a split, decoded once for all encoders."""
    batch_size = min(batch_size, len(source))
    with make_loader(config, seed=0, global_batch=batch_size, source=source) as loader:
        steps = steps_in_pass(len(source), batch_size)
        return list(tqdm(loader, total=steps, desc=f"decoding {split}", disable=None))


def table(result: Evaluation) -> str:
    """The rows as text, one line per encoder and label."""
    lines = []
    for task in result.tasks:
        lines.append(
            f"{task.label}: {len(task.classes)} classes, {len(task.train.rows)} training and "
            f"{len(task.test.rows)} held-out clips, majority {task.majority:.3f}"
        )
        lines += [
            f"  linear {row['linear']:.3f}   10-NN {row['knn']:.3f}   {row['encoder']}"
            for row in result.rows
            if row["label"] == task.label
        ]
    return "\n".join(lines)
