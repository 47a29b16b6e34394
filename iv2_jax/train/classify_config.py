"""The config of a run that trains a classifier of clips, and its cross checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from iv2_jax.data.data_config import DataConfig
from iv2_jax.errors import ConfigError
from iv2_jax.models.classifier import ClassifierConfig
from iv2_jax.train.init_towers import TowerInit
from iv2_jax.train.stage import RunConfig

if TYPE_CHECKING:
    from iv2_jax.train.classify import ClassifyStage


@dataclass(frozen=True)
class MixupConfig:
    """Mixing of clips and their targets on the device (spec stage1 7.4); off by default.

    Attributes:
        mixup: both parameters of the Beta distribution of a blend's weight; 0 for no blends.
            The recipes have 0.8.
        cutmix: the same of the share that a pasted box leaves; 0 for none. The recipes have 1.
        probability: of mixing a group at all.
        switch: of a box rather than a blend, where both are on.
        group: neighbouring rows that share one draw; row i of n is mixed with row n - 1 - i. The
            original's are the rows of a GPU, both copies of a clip among them; 0 takes all rows.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5
    group: int = 0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix", "group"):
            if getattr(self, name) < 0:
                raise ConfigError(f"mixup.{name} must not be negative, is {getattr(self, name)}")
        for name in ("probability", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"mixup.{name} must be from 0 to 1, is {getattr(self, name)}")

    @property
    def enabled(self) -> bool:
        """Whether anything is mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0


@dataclass(frozen=True)
class ErasingConfig:
    """Random erasing on the device: a box of noise, the same in all frames (spec stage1 7.4).

    Attributes:
        probability: of erasing a row; 0 turns it off. The recipes have 0.25.
        area: smallest and largest share of the picture.
        ratio: smallest height by width; the largest is its inverse.
    """

    probability: float = 0.0
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"erasing.probability must be from 0 to 1, is {self.probability}")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"erasing.area must be two shares from 0 to 1, is {self.area}")
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"erasing.ratio must be above 0 and at most 1, is {self.ratio}")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(RunConfig):
    """Fine-tuning or probing of a video classifier (spec stage1 6.3 and 6.4).

    `batch_size` counts clips; with `data.views` > 1 (repeated augmentation) each has so many rows.
    A probe is the same run with `optimizer.freeze` (and `open`).

    Attributes:
        data: training clips.
        classifier: encoder and head.
        label: name of the label set that is learnt. Text lists have `label`.
        classes: names of the classes in the order of their numbers, where labels are names; empty
            takes the training clips' names, sorted.
        init: weights to start from, laid over each other in their order: tower `vision` fills the
            encoder, `model` a whole classifier, its last map by `rows`.
        label_smoothing: share of a target that is spread evenly over all classes.
        mixup: mixing of clips.
        erasing: erasing of boxes.
        accumulate: parts that a batch is worked through in, for memory. Each part is mixed and
            erased by itself.
        eval_batch_size: clips of an evaluation's batch; 0 takes `batch_size`. With several views
            (`eval_data.views` and `crops`) they go through the model one after the other.
        test_views: temporal views of a clip in `iv2 eval --task classification`.
        test_crops: crops of each.
    """

    data: DataConfig
    classifier: ClassifierConfig
    label: str = "label"
    classes: tuple[str, ...] = ()
    init: tuple[TowerInit, ...] = ()
    label_smoothing: float = 0.1
    mixup: MixupConfig = field(default_factory=MixupConfig)
    erasing: ErasingConfig = field(default_factory=ErasingConfig)
    accumulate: int = 1
    eval_batch_size: int = 0
    test_views: int = 1
    test_crops: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, data in (("data", self.data), ("eval_data", self.eval_data)):
            if data is not None:
                self._check_view(name, data)
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}")
        for name, least in (
            *(("accumulate", 1), ("test_views", 1), ("test_crops", 1)),
            ("eval_batch_size", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be >= {least}, not {getattr(self, name)}")
        if self.classes and len(self.classes) != self.classifier.num_classes:
            raise ConfigError(
                f"classes names {len(self.classes)}, but classifier.num_classes is "
                f"{self.classifier.num_classes}"
            )
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError("classes names a class twice")
        if self.classifier.merges_tokens and self.classifier.merge_norm != "LN":
            raise ConfigError(
                f"classifier.merge_norm {self.classifier.merge_norm!r} keeps running statistics, "
                "which this stage does not move (released probes with it can be evaluated): use LN"
            )
        self._check_rows()

    def _check_view(self, name: str, data: DataConfig) -> None:
        """Pictures are the encoder's, and there is nothing else in a row."""
        encoder = self.classifier.encoder
        pairs = (
            ("size", data.size, encoder.image_size),
            ("frames", data.frames, encoder.num_frames),
        )
        for what, have, want in pairs:
            if have != want:
                raise ConfigError(f"{name}.{what} must be the encoder's {want}, not {have}")
        if data.media not in ("video", "image"):
            raise ConfigError(f"{name}.media {data.media!r}: a classifier takes video or image")
        for what, nothing in (("text", None), ("targets", ""), ("mask", "none")):
            if getattr(data, what) != nothing:
                raise ConfigError(f"{name}.{what}: a classifier has no use for it, leave it out")

    def _check_rows(self) -> None:
        """Batch, parts and groups of mixing fit."""
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}"
            )
        rows = self.batch_size // self.accumulate * self.data.num_views
        if self.mixup.group and rows % self.mixup.group:
            raise ConfigError(
                f"mixup.group {self.mixup.group} does not divide the {rows} rows that are mixed at "
                "once (batch_size / accumulate x data.views)"
            )

    def make_stage(self) -> ClassifyStage:
        """The stage."""
        from iv2_jax.train.classify import ClassifyStage

        return ClassifyStage(self)
