"""What a training stage is to the loop, and the config fields that every stage shares."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from iv2_jax.data.pipeline import DataConfig
from iv2_jax.errors import ConfigError, nearest
from iv2_jax.parallel.mesh import MeshConfig
from iv2_jax.train.checkpoint import CheckpointConfig
from iv2_jax.train.optim import OptimizerConfig

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]

# stage name -> module:class of its run config. A new stage is one file and one line here.
STAGES = {
    "distill": "iv2_jax.train.distill:DistillConfig",
    "align": "iv2_jax.train.align_config:AlignConfig",
    "clip": "iv2_jax.train.clip:ClipTrainConfig",
    "classify": "iv2_jax.train.classify_config:ClassifyConfig",
    "bridge": "iv2_jax.train.bridge:BridgeTrainConfig",
    "instruct": "iv2_jax.train.instruct_config:InstructConfig",
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(abc.ABC):
    """Fields of every run; each stage adds its data, models and losses in a subclass.

    Attributes:
      stage: Name in `STAGES`.
      steps: Optimizer steps of the whole run.
      batch_size: Clips per step over all devices and hosts.
      eval_data: Held-out clips, or None for no evaluation in the loop.
      seed: Of initialisation, data order, masks and drop path.
      optimizer: Rates and parameter groups.
      mesh: Device mesh.
      checkpoint: When to save.
      init_from: Checkpoint whose weights start the run at step 0 (not a resume).
      resume: "auto" goes on from the workdir's newest checkpoint if there is one; "never" refuses
        a workdir that has one; "force" goes on even with another config.
      log_every: Steps between lines in metrics.jsonl.
      eval_every: Steps between evaluations; the first and last step are always evaluated.
      eval_batches: Batches of an evaluation; 0 = all held-out clips.
      tensorboard: Write event files.
      on_nan: What a loss or gradient that is not finite does: "stop" ends the run with code 3;
        "skip" leaves that step's update out. Either way `bad_steps.jsonl` names its clips.
      max_skipped: Steps of the whole run that may be skipped; one more stops it.
      step_timeout: Seconds without a finished step, or save, after which the process shows where
        it hangs and exits with 75; 0 = wait forever. Evaluation may take any time.
      stop_timeout: The same from a request to stop (SIGTERM) to the end; 0 = wait forever.
      stop_after: Stop (with a checkpoint) after so many steps of this process; 0 = go to the end.
    """

    stage: str
    steps: int
    batch_size: int
    eval_data: DataConfig | None = None
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init_from: str | None = None
    resume: Literal["auto", "never", "force"] = "auto"
    log_every: int = 1
    eval_every: int = 0
    eval_batches: int = 0
    tensorboard: bool = True
    on_nan: Literal["stop", "skip"] = "stop"
    max_skipped: int = 10
    step_timeout: float = 1800.0
    stop_timeout: float = 900.0
    stop_after: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, not {getattr(self, name)}")
        for name in (
            *("eval_every", "eval_batches", "stop_after"),
            *("max_skipped", "step_timeout", "stop_timeout"),
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be >= 0, not {getattr(self, name)}")

    @abc.abstractmethod
    def make_stage(self) -> Stage:
        """The stage that this config describes."""


class Stage(abc.ABC):
    """A stage: its parameters, its frozen models and its loss; everything else is the loop's."""

    # Batch arrays that stay on the host (bookkeeping); the rest goes to the devices.
    host_arrays: ClassVar[tuple[str, ...]] = ("index", "replaced", "valid", "media")

    # Micro-batches that a batch is worked through in, one after the other: each has every n-th row,
    # so that no row leaves its device. The step's loss is the mean of theirs.
    parts: int = 1

    @abc.abstractmethod
    def init_params(self, rng: jax.Array) -> Any:
        """Fresh parameters with logical axis names (boxed); traced, so no I/O."""

    def load_frozen(self) -> Any:
        """Weights of frozen models as host arrays; {} when there are none.

        Raises:
          UserError: A weight file is missing or does not fit.
        """
        return {}

    @abc.abstractmethod
    def abstract_frozen(self) -> Any:
        """Shapes of `load_frozen`, without reading anything."""

    def starting_params(self) -> Any:
        """Host arrays laid over the fresh parameters at step 0: a part of their tree.

        Raises:
          UserError: A weight file is missing or does not fit.
        """
        return {}

    def start(self, params: Any, mesh: Mesh) -> None:
        """Called once before the first batch, with the parameters that the run goes on from."""
        del params, mesh

    @abc.abstractmethod
    def abstract_batches(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Shapes of the device arrays of each kind of batch, by kind.

        A batch names its kind in `media`; a stage with one kind calls it "". Each kind has a step
        of its own, compiled before the first.
        """

    def weigh(self, batch: Batch) -> Batch:
        """The batch with what a row's share in the loss follows from, before it is split in parts.

        Traced in the step. A loss that is a plain mean over rows needs nothing.
        """
        return batch

    @abc.abstractmethod
    def loss_fn(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Metrics]:
        """Scalar loss and scalar metrics of a global batch, or of one of its parts; pure."""

    def project(self, params: Any) -> Any:
        """Brings updated parameters back to where they may be; traced in the step."""
        return params

    def evaluate(self, params: Any, frozen: Any, mesh: Mesh) -> dict[str, float]:
        """Figures of an evaluation beside the mean loss terms; {} when there are none."""
        del params, frozen, mesh
        return {}

    @abc.abstractmethod
    def tokens_per_clip(self, kind: str = "") -> int:
        """Tokens that the trained model sees of one clip of a kind of batch, for throughput."""

    @abc.abstractmethod
    def train_batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the batches from `start_step` on."""

    @abc.abstractmethod
    def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the held-out batches; empty without `eval_data`."""


def config_class(stage: str) -> type[RunConfig]:
    """The run config dataclass of a stage.

    Raises:
      ConfigError: Unknown stage, with the nearest name.
    """
    if stage not in STAGES:
        raise ConfigError(f"config.stage {stage!r} is unknown{nearest(str(stage), STAGES)}")
    module, _, name = STAGES[stage].partition(":")
    return getattr(importlib.import_module(module), name)
