"""Classifiers over held-out clips, several views of each (spec stage1 7.5).

A clip's score is the mean of its views' probabilities. Clips are told apart by their place in the
list; the original merges scores by file stem, so that two files of one name become one (trap 20).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from iv2_jax import config as config_lib
from iv2_jax.data.classes import class_names, class_numbers
from iv2_jax.data.corpora import open_data
from iv2_jax.data.pipeline import DataConfig, make_loader
from iv2_jax.data.records import Clip
from iv2_jax.errors import CheckpointError, ConfigError, DataError
from iv2_jax.eval.answers_stats import wilson
from iv2_jax.eval.zero_shot import accuracy, mean_average_precision
from iv2_jax.models import kinds
from iv2_jax.models.classifier import Classifier, ClassifierConfig
from iv2_jax.parallel import distributed, rules
from iv2_jax.parallel.mesh import BATCH_AXES, batch_sharding, replicated
from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train.classify import log_probabilities
from iv2_jax.train.classify_config import ClassifyConfig

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvaluatedClassifier:
    """A classifier and how its run reads clips.

    Attributes:
      name: Where it comes from.
      params: Host arrays.
      config: Encoder and head.
      run: The run's config, or None where no run of ours made it.
    """

    name: str
    params: Any
    config: ClassifierConfig
    run: ClassifyConfig | None


@dataclasses.dataclass
class ClassificationResult:
    """Scores of a set of clips.

    Attributes:
      metrics: Percent: `top1`, with its 95 % interval `top1_low` and `top1_high`, `top5` (from six
        classes on), `class_mean`, `map` (mean average precision over classes), `chance/top1`,
        `chance/top5`, `majority` (always the commonest class); `clips`, `classes`, `left_out`.
      probabilities: (V, C) float32, mean over views.
      labels: int (V,).
      clips: The V clips that decode.
      names: Of the classes; numbers as text where they have none.
      left_out: Ids of clips that do not decode.
    """

    metrics: dict[str, float]
    probabilities: np.ndarray
    labels: np.ndarray
    clips: list[Clip]
    names: tuple[str, ...]
    left_out: list[str]

    def by_class(self) -> dict[str, dict[str, float]]:
        """Class -> its clips, and the percent of them that are right."""
        found = self.probabilities.argmax(axis=1)
        return {
            self.names[c]: {
                "clips": int((self.labels == c).sum()),
                "top1": 100.0 * float((found[self.labels == c] == c).mean()),
            }
            for c in np.unique(self.labels)
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values, with every clip's most probable class."""
        found = self.probabilities.argmax(axis=1)
        return {
            "metrics": self.metrics,
            "by_class": self.by_class(),
            "left_out": self.left_out,
            "predictions": {
                clip.id: {
                    "right": self.names[right],
                    "found": self.names[best],
                    "probability": round(float(row[best]), 4),
                }
                for clip, right, best, row in zip(
                    self.clips, self.labels, found, self.probabilities, strict=True
                )
            },
        }


def load_classifier(path: str, *, ema: bool = False) -> EvaluatedClassifier:
    """Reads a run, an imported checkpoint or an exported folder.

    Raises:
      CheckpointError: There is none at `path`, or it is no classifier.
    """
    from iv2_jax.interop import importing, run_config

    run = None
    if run_config.is_exported(Path(path)):
        if ema:
            raise CheckpointError(f"{path} is an exported folder: it has no moving average")
        params, config = importing.read_exported_model(path)
    else:
        params, values = checkpoint_lib.load_params(path, ema=ema)
        if values.get("stage") == "classify":
            run = config_lib.build(ClassifyConfig, values)
        config = run_config.read_run(values)
    if not isinstance(config, ClassifierConfig):
        raise CheckpointError(
            f"{path} holds a model of kind {kinds.of(config).name!r}, not a classifier; its "
            "encoder can be probed (--task probe) or fine-tuned (stage classify)"
        )
    return EvaluatedClassifier(path, params, config, run)


def evaluation_set(
    model: EvaluatedClassifier,
    *,
    source: str | None = None,
    format: str = "auto",
    prefix: str = "",
    split: str | None = None,
    views: int | None = None,
    crops: int | None = None,
) -> DataConfig:
    """How to read clips: as the run's held-out ones, with what is given on top.

    Args:
      model: Whose run's `eval_data` is taken; else evenly spread frames (rule `segments`).
      source: Manifest or packed set; None keeps the run's.
      format: Of the manifest, when `source` is given.
      prefix: Of its paths, when `source` is given.
      split: None keeps the run's; empty takes all clips.
      views: Temporal views of a clip; None takes the run's `test_views`.
      crops: Crops of each; None takes the run's `test_crops`.

    Raises:
      ConfigError: There are no clips to read.
    """
    encoder, run = model.config.encoder, model.run
    data = DataConfig(
        num_frames=encoder.num_frames,
        size=encoder.image_size,
        sampling="segments",
        augment="center",
    )
    if run is not None:
        data = run.eval_data or run.data
    if source is not None:
        data = dataclasses.replace(data, source=source, format=format, prefix=prefix, corpora=())
    if not data.source and not data.corpora:
        raise ConfigError(f"{model.name} names no held-out clips: give --data")
    if split is not None:
        data = dataclasses.replace(data, split=split or None)
    crops = crops or (run.test_crops if run else 1)
    one_pass = {"eval": True, "fixed_view": False, "keep_views": 0, "keep_gb": 0.0}
    return dataclasses.replace(
        data,
        **one_pass,
        views=views or (run.test_views if run else 1),
        crops=crops,
        shared_frames=False,
        rand_augment=None,
        augment="stretch" if data.augment == "stretch" else "center",
        short_side=None if crops > 1 else data.short_side,
    )


def names_of(
    model: EvaluatedClassifier, clips: Sequence[Clip], label: str, given: Sequence[str] = ()
) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers, empty where labels are numbers.

    Args:
      model: Its run knows them, or can read them off its training clips.
      clips: The clips that are evaluated.
      label: Name of the label set.
      given: Overrules the run.

    Raises:
      DataError: Labels are names, and nothing says which number each has.
    """
    if given or not class_names(clips, label):
        return tuple(given)
    if model.run is None:
        raise DataError(
            f"{model.name} does not say which class {label!r} names are: --classes FILE"
        )
    if model.run.classes:
        return model.run.classes
    try:
        return class_names(open_data(model.run.data).clips, model.run.label)
    except DataError as error:
        raise DataError(
            f"the classes of {model.name} are those of its training clips, which cannot be read: "
            f"{error}; give --classes FILE"
        ) from None


def evaluate_classifier(
    params: Any,
    config: ClassifierConfig,
    data: DataConfig,
    label: str,
    mesh: Mesh,
    *,
    names: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
) -> ClassificationResult:
    """Classifies every clip once.

    Args:
      params: Host arrays.
      config: Of the classifier.
      data: The held-out clips and their views.
      label: Name of the label set.
      mesh: Device mesh.
      names: Of the classes, for labels that are names.
      batch_size: Clips of a batch over all devices, rounded up to what the mesh can split; their
        views go through the model one after the other.
      seed: Of the loader.

    Raises:
      DataError: A clip has no label or an unknown one, or none decodes.
    """
    shardings, _ = rules.shardings(kinds.of(config).boxed_params(config), mesh)
    params = jax.tree.map(distributed.put, params, shardings)
    step = _step(config, mesh)
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    shards = int(np.lcm(shards, jax.process_count()))
    loader = make_loader(
        data,
        seed=seed,
        global_batch=-(-batch_size // shards) * shards,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    scores, places, decoded = [], [], []
    with loader:
        clips = loader.source.clips
        numbers = class_numbers(clips, label, config.num_classes, names)
        for batch in loader:
            arrays = {
                name: jax.make_array_from_process_local_data(
                    batch_sharding(mesh), np.asarray(batch[name])
                )
                for name in ("video", "index", "valid")
            }
            found = jax.device_get(step(params, arrays))
            real = found["index"] >= 0
            places.append(found["index"][real])
            decoded.append(found["valid"][real])
            scores.append(found["scores"][real])
    index, valid = np.concatenate(places), np.concatenate(decoded)
    left_out = [clips[i].id for i in index[~valid]]
    if left_out:
        logger.warning("%d clips do not decode and are left out: %s", len(left_out), left_out[:5])
    if not valid.any():
        raise DataError("no held-out clip decodes")
    order = np.argsort(index[valid])
    index = index[valid][order]
    probabilities = np.exp(np.concatenate(scores)[valid][order])
    labels = numbers[index]
    metrics = _metrics(probabilities, labels, len(left_out))
    names = tuple(names) or tuple(map(str, range(config.num_classes)))
    return ClassificationResult(
        metrics, probabilities, labels, [clips[i] for i in index], names, left_out
    )


def _step(config: ClassifierConfig, mesh: Mesh) -> Any:
    """Compiled (params, batch) -> log-probabilities of all rows, on every process."""
    model = Classifier(config)

    def step(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            scores = log_probabilities(model, params, batch["video"])
        return {"scores": scores, "index": batch["index"], "valid": batch["valid"]}

    return jax.jit(step, out_shardings=replicated(mesh))


def _metrics(probabilities: np.ndarray, labels: np.ndarray, left_out: int) -> dict[str, float]:
    """See `ClassificationResult.metrics`."""
    clips, classes = probabilities.shape
    figures = accuracy(probabilities, labels)
    tops = [k for k in (1, 5) if k == 1 or k < classes]
    right = round(figures["top1"] / 100 * clips)
    low, high = wilson(right, clips)
    seen = np.unique(labels)
    return {
        **{f"top{k}": figures[f"top{k}"] for k in tops},
        "top1_low": 100.0 * low,
        "top1_high": 100.0 * high,
        "class_mean": figures["class_mean"],
        # Classes without a clip have no precision.
        "map": mean_average_precision(probabilities[:, seen], labels[:, None] == seen),
        **{f"chance/top{k}": 100.0 * k / classes for k in tops},
        "majority": 100.0 * float(np.bincount(labels).max()) / clips,
        "clips": float(clips),
        "classes": float(classes),
        "left_out": float(left_out),
    }


def line(name: str, data: DataConfig, result: ClassificationResult) -> str:
    """One model's figures as text."""
    m = result.metrics
    top5 = f", top-5 {m['top5']:.1f} ({m['chance/top5']:.1f})" if "top5" in m else ""
    return (
        f"{name}: top-1 {m['top1']:.1f} [{m['top1_low']:.1f}, {m['top1_high']:.1f}] (chance "
        f"{m['chance/top1']:.1f}, commonest class {m['majority']:.1f}){top5}, class mean "
        f"{m['class_mean']:.1f}, mAP {m['map']:.1f}; {m['clips']:.0f} clips of {m['classes']:.0f} "
        f"classes, {data.views} x {data.crops} views, {m['left_out']:.0f} left out"
    )
