"""Fine-tuning and probing of video classifiers (spec stage1 6.3 to 7.5).

A batch, rows split over the mesh's data and fsdp axes:
  video     (B, T, H, W, 3) uint8, RGB; (B, V, T, H, W, 3) with V views of each clip
  label     (B,) int32, classes
  valid     (B,) bool, evaluation only: False for the rows that fill up the last batch and for clips
            that do not decode
and on the host only `index` and `replaced`, as in stage 1. Erasing and mixing are drawn on the
device from the step's key, so that a resumed run repeats them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from iv2_jax.data.classes import class_names, class_numbers
from iv2_jax.data.corpora import open_data
from iv2_jax.data.pipeline import DataConfig, make_loader
from iv2_jax.data.records import Clip
from iv2_jax.errors import ConfigError
from iv2_jax.models import kinds
from iv2_jax.models.classifier import Classifier
from iv2_jax.parallel.mesh import check_batch_size, keep_rows_split
from iv2_jax.train import classify_mixing
from iv2_jax.train.batches import abstract_batch
from iv2_jax.train.classify_config import ClassifyConfig
from iv2_jax.train.init_towers import load_towers
from iv2_jax.train.stage import Batch, Metrics, Stage

TOP = (1, 5)


class ClassifyStage(Stage):
    """A classifier and its cross-entropy."""

    host_arrays: ClassVar[tuple[str, ...]] = ("index", "replaced", "media")

    def __init__(self, config: ClassifyConfig) -> None:
        self.config = config
        self.model: Classifier = kinds.of(config.classifier).build(config.classifier)
        self.parts = config.accumulate

    def init_params(self, rng: jax.Array) -> Any:
        """Fresh parameters (boxed)."""
        return kinds.of(self.config.classifier).init_params(self.config.classifier, rng)

    def starting_params(self) -> Any:
        """What `init` names, as a part of the parameter tree."""
        return load_towers(self.config.init, self.config.classifier)

    def abstract_frozen(self) -> Any:
        """No frozen models beside the trained one."""
        return {}

    def start(self, params: Any, mesh: Mesh) -> None:
        """Refuses an evaluation's batch that does not fit the mesh."""
        del params
        if self.config.eval_data is None:
            return
        try:
            check_batch_size(self._eval_batch_size, mesh)
        except ConfigError as error:
            raise ConfigError(f"eval_batch_size: {error}") from None

    @property
    def _eval_batch_size(self) -> int:
        return self.config.eval_batch_size or self.config.batch_size

    def abstract_batches(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One kind; see the module's docstring."""
        label = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        return {"": abstract_batch(self.config.data, batch_size) | {"label": label}}

    def tokens_per_clip(self, kind: str = "") -> int:
        """All tokens of all of a clip's rows: nothing is hidden."""
        return self.config.data.num_views * self.config.classifier.encoder.num_tokens

    def loss_fn(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Metrics]:
        """Cross-entropy with soft targets; in evaluation that of the views' mean probability."""
        del frozen
        if not train:
            return self._judge(params, batch)
        config, encoder = self.config, self.config.classifier.encoder
        erase_rng, mix_rng, drop_rng, dropout_rng = jax.random.split(rng, 4)
        video, labels = self._rows(batch)
        video = encoder.normalize(video)
        targets = classify_mixing.smooth_targets(
            labels, config.classifier.num_classes, config.label_smoothing
        )
        if config.erasing.probability:
            video = classify_mixing.erase(video, config.erasing, erase_rng)
        if config.mixup.enabled:
            video, targets = classify_mixing.mix(video, targets, config.mixup, mix_rng)
        logits = self.model.apply(
            {"params": params},
            keep_rows_split(video),
            train=True,
            rngs={"droppath": drop_rng, "dropout": dropout_rng},
        )
        loss = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1))
        # A mixed row has no one right class.
        return loss, {} if config.mixup.enabled else {"top1": accuracy(logits, labels)["top1"]}

    def _rows(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Pixels (R, T, H, W, 3) and labels (R,), the copies of a clip next to each other."""
        video, labels, views = batch["video"], batch["label"], self.config.data.num_views
        if views == 1:
            return video, labels
        return video.reshape(-1, *video.shape[2:]), jnp.repeat(labels, views)

    def _judge(self, params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Loss and accuracy in percent of the rows that are valid."""
        valid = batch.get("valid", jnp.ones(len(batch["label"]), bool))
        scores = log_probabilities(self.model, params, batch["video"])
        nll = -jnp.take_along_axis(scores, batch["label"][:, None], axis=1)[:, 0]
        loss = jnp.sum(jnp.where(valid, nll, 0.0)) / jnp.maximum(jnp.sum(valid), 1)
        return loss, accuracy(scores, batch["label"], valid)

    @functools.cached_property
    def _trained_names(self) -> tuple[str, ...]:
        """Names of the training clips' classes, in the order of their numbers."""
        return class_names(open_data(self.config.data).clips, self.config.label)

    def _numbers(self, clips: Sequence[Clip]) -> np.ndarray:
        """The class of every clip."""
        config = self.config
        names = config.classes
        # Long lists have numbers: the training list is read again for names alone.
        if not names and class_names(clips, config.label):
            names = self._trained_names
        return class_numbers(clips, config.label, config.classifier.num_classes, names)

    def train_batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless training batches from `start_step` on."""
        return self._labelled(self.config.data, self.config.batch_size, start_step)

    def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The held-out clips once, in order."""
        if self.config.eval_data is None:
            return (batch for batch in ())
        data = dataclasses.replace(self.config.eval_data, eval=True)
        return self._labelled(data, self._eval_batch_size, 0)

    def _labelled(
        self, data: DataConfig, batch_size: int, start_step: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of the loader with their classes."""
        loader = make_loader(
            data,
            seed=self.config.seed,
            global_batch=batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=start_step,
        )
        with loader:
            numbers = self._numbers(loader.source.clips)
            for batch in loader:
                index = np.asarray(batch["index"])
                # Rows that fill up the last batch have no clip; `valid` leaves them out.
                label = np.where(index >= 0, numbers[np.maximum(index, 0)], 0)
                yield batch | {"label": label.astype(np.int32)}


def log_probabilities(model: Classifier, params: Any, video: jax.Array) -> jax.Array:
    """Log of the probabilities of each class, averaged over views (spec stage1 7.5).

    Args:
        model: the classifier.
        params: its parameters.
        video: (B, T, H, W, 3) uint8, or (B, V, T, H, W, 3) with V views, which go through the model
            one after the other.

    Returns:
        (B, C) float32.
    """
    encoder = model.config.encoder

    def one(view: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, encoder.normalize(keep_rows_split(view)))
        return jax.nn.log_softmax(logits)

    if video.ndim == 5:
        return one(video)
    views = jax.lax.map(one, jnp.moveaxis(video, 1, 0))
    return jax.nn.logsumexp(views, axis=0) - jnp.log(views.shape[0])


def accuracy(scores: jax.Array, labels: jax.Array, valid: jax.Array | None = None) -> Metrics:
    """Top-1 and, with more than five classes, top-5, in percent of the valid rows.

    Args:
        scores: (B, C); a class that ties with the right one counts as before it.
        labels: (B,) int.
        valid: (B,) bool; None for all.
    """
    valid = jnp.ones(labels.shape, bool) if valid is None else valid
    right = jnp.take_along_axis(scores, labels[:, None], axis=1)
    rank = jnp.sum(scores >= right, axis=1) - 1
    count = jnp.maximum(jnp.sum(valid), 1)
    return {
        f"top{k}": 100.0 * jnp.sum((rank < k) & valid) / count
        for k in TOP
        if k == 1 or k < scores.shape[1]
    }
