"""Linear and k-NN probes of frozen encoders on labelled clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from iv2_jax.data.records import Clip
from iv2_jax.errors import DataError, nearest
from iv2_jax.eval.knn import knn_accuracy
from iv2_jax.eval.linear_probe import linear_probe


@dataclass(frozen=True)
class LabelledRows:
    """Rows of a feature matrix that carry a label, with classes as numbers.

    Attributes:
      rows: (n,) row numbers in the split's list of clips.
      labels: (n,) int classes.
      groups: (n,) ids of rows that belong together.
    """

    rows: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Task:
    """A label to probe for.

    Attributes:
      label: Name of the label set.
      classes: Class names, in the order of their numbers.
      train: Rows of the training split.
      test: Rows of the held-out split whose class is among the training ones.
      left_out: Held-out clips of classes that no training clip has.
    """

    label: str
    classes: tuple[str, ...]
    train: LabelledRows
    test: LabelledRows
    left_out: int

    @property
    def majority(self) -> float:
        """Accuracy of always answering the training split's commonest class."""
        commonest = np.bincount(self.train.labels).argmax()
        return float(np.mean(self.test.labels == commonest))


def label_names(train: Sequence[Clip], test: Sequence[Clip]) -> list[str]:
    """Labels worth probing: at least two classes, each with two training clips, seen in both."""
    names = []
    for name in sorted({name for clip in train for name in clip.labels}):
        values = [str(c.labels[name]) for c in train if name in c.labels]
        counts = {value: values.count(value) for value in values}
        held_out = {str(c.labels[name]) for c in test if name in c.labels}
        common = [v for v, n in counts.items() if n >= 2 and v in held_out]
        if len(common) >= 2 and len(values) >= 4 * len(common):
            names.append(name)
    return names


def make_task(label: str, train: Sequence[Clip], test: Sequence[Clip]) -> Task:
    """Numbers the classes of one label in both splits.

    Raises:
      DataError: No clip of a split has the label, or there is only one class.
    """
    for name, clips in (("training", train), ("held-out", test)):
        if not any(label in clip.labels for clip in clips):
            known = {n for clip in clips for n in clip.labels}
            raise DataError(f"no {name} clip has a label {label!r}{nearest(label, known)}")
    classes = tuple(sorted({str(c.labels[label]) for c in train if label in c.labels}))
    if len(classes) < 2:
        raise DataError(f"label {label!r} has a single class, {classes[0]!r}: nothing to probe")
    number = {name: i for i, name in enumerate(classes)}

    def rows(clips: Sequence[Clip]) -> LabelledRows:
        keep = [i for i, c in enumerate(clips) if str(c.labels.get(label, "\0")) in number]
        return LabelledRows(
            rows=np.asarray(keep),
            labels=np.asarray([number[str(clips[i].labels[label])] for i in keep]),
            groups=np.asarray([clips[i].group or clips[i].id for i in keep]),
        )

    held_out = rows(test)
    if not len(held_out.rows):
        raise DataError(f"no held-out clip has a class of label {label!r} that was trained on")
    labelled = sum(label in clip.labels for clip in test)
    return Task(label, classes, rows(train), held_out, labelled - len(held_out.rows))


def probe(
    task: Task, train: dict[str, np.ndarray], test: dict[str, np.ndarray], *, seed: int = 0
) -> dict[str, Any]:
    """Probes one encoder's features for one label.

    Args:
      task: The label's rows in both splits.
      train: Features of every training clip, as `eval.features.extract` gives them.
      test: Features of every held-out clip.
      seed: Of the cross-validation folds.

    Returns:
      `linear`: accuracy of a linear probe of the per-frame features; `knn`: of a 10-nearest vote
      on the clip means; `penalty` that the probe chose; `predictions` of the linear probe.
    """
    x, tx = train["frames"][task.train.rows], test["frames"][task.test.rows]
    fitted = linear_probe(x, task.train.labels, tx, task.test.labels, task.train.groups, seed=seed)
    x, tx = train["mean"][task.train.rows], test["mean"][task.test.rows]
    return {
        "linear": fitted.accuracy,
        "knn": knn_accuracy(x, task.train.labels, tx, task.test.labels),
        "penalty": fitted.penalty,
        "predictions": fitted.predictions,
    }
