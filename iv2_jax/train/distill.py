"""Stage 1: masked distillation of a video student from frozen teachers (paper 3.1, spec stage1 3).

The same stage trains the 1B and 6B students (two teachers), the distilled S, B and L (one teacher,
whole-clip masks) and the demo (teachers from an image network with another patch grid).

A batch, rows split over the mesh's data and fsdp axes:
  video     (B, T, H, W, 3) uint8, RGB; T is the student's frames times `frame_stride`
  visible   (B, N_visible) int32, only with masks made by the loader (`mask.kind` tube or random)
  {role}_tokens (B, K, N, C), {role}_pooled (B, C'), {role}_saliency (B, T', H'W'), all float16, of
            roles clip and mae: the teachers' outputs, only with `teacher_features`
and on the host only:
  index     (B,) int32, position of the clip in its list
  replaced  (B,) int32, undecodable clips passed over for this row
  valid     (B,) bool, evaluation only: False for the rows that fill up the last batch
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from iv2_jax import config as config_lib
from iv2_jax.data.pipeline import DataConfig, make_loader
from iv2_jax.data.targets import check_settings
from iv2_jax.errors import ConfigError
from iv2_jax.models import masking, teachers
from iv2_jax.models.int8 import Int8
from iv2_jax.models.student import AlignmentConfig, Student, StudentConfig, StudentOutput
from iv2_jax.models.teachers import stored
from iv2_jax.models.teachers.base import Teacher, TeacherOutput
from iv2_jax.objectives import distillation
from iv2_jax.train.stage import Batch, Metrics, RunConfig, Stage

# What decides which pixels of a clip are seen.
VIEW_FIELDS = ("num_frames", "size", "short_side", "sampling", "stride", "released_minus_one")


@dataclass(frozen=True)
class TeacherConfig:
    """A frozen teacher.

    Attributes:
      name: Its name in `models.teachers.TEACHERS`.
      options: Fields of its class: `weights`, sizes, flags.
      int8: What of it is int8: "none"; its kernels in memory ("weights"); both sides of its matrix
        products too ("products"). Needs the extra `int8`.
      int8_keep: Patterns of paths of kernels that stay as they are (`blocks/mlp/fc2/kernel`).
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    int8: Int8 = "none"
    int8_keep: tuple[str, ...] = ()

    def make(self) -> Teacher:
        """The teacher.

        Raises:
          ConfigError: Unknown name, option or pattern, or the extra `int8` is not installed.
        """
        return teachers.get(self.name, self.options, int8=self.int8, int8_keep=self.int8_keep)

    def settings(self) -> dict[str, Any]:
        """The fields that its outputs follow from; as folders had them that know no int8."""
        fields = config_lib.to_dict(self)
        if self.int8 == "none":
            del fields["int8"], fields["int8_keep"]
        return fields


@dataclass(frozen=True)
class MaskConfig:
    """Which patches the student sees (spec stage1 3.5).

    Attributes:
      kind: "attention" draws them by the teacher's saliency, "uniform" by chance, both on the
        device; "tube" and "random" come with the batch.
      ratio: Share of patches hidden.
      scope: "frame" shows equally many of every frame (stage 1), "clip" draws over the whole clip
        (the distilled sizes).
      guide: Teacher whose saliency counts.
    """

    kind: Literal["attention", "uniform", "tube", "random"] = "attention"
    ratio: float = 0.8
    scope: Literal["frame", "clip"] = "frame"
    guide: Literal["clip", "mae"] = "clip"

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"mask.ratio must be in [0, 1), not {self.ratio}")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three terms; the original's are all 1."""

    clip: float = 1.0
    final: float = 1.0
    mae: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    """A stage-1 run.

    Attributes:
      data: Training clips.
      student: The student with its alignment heads.
      clip_teacher: Teacher of the `clip` group and of the final feature; sees the student's frames.
      mae_teacher: Teacher of the `mae` group; sees every frame of the batch.
      mask: Which patches the student sees.
      loss: Weights of the terms.
      teacher_features: Folder that `iv2 data teacher-features` wrote; the run reads what the
        teachers give from it instead of running them. Clips are then always seen in the view it
        was made of (`data.fixed_view`).
    """

    data: DataConfig
    student: StudentConfig
    clip_teacher: TeacherConfig | None = None
    mae_teacher: TeacherConfig | None = None
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    teacher_features: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        encoder = self.student.encoder
        if self.data.num_frames % encoder.num_frames:
            raise ConfigError(
                f"data.num_frames {self.data.num_frames} must be a multiple of "
                f"student.encoder.num_frames {encoder.num_frames}"
            )
        for name, data in (("data", self.data), ("eval_data", self.eval_data)):
            if data is not None and data.size != encoder.image_size:
                raise ConfigError(
                    f"{name}.size {data.size} is not student.encoder.image_size "
                    f"{encoder.image_size}"
                )
        if self.teacher_features:
            self._check_views()

    def _check_views(self) -> None:
        """Stored features are of one view of a clip, the same in training and evaluation."""
        dataclasses.replace(self.data, fixed_view=True)  # refuses data that gives other views
        for name in VIEW_FIELDS if self.eval_data else ():
            ours, theirs = getattr(self.data, name), getattr(self.eval_data, name)
            if ours != theirs:
                raise ConfigError(
                    f"teacher_features needs eval_data.{name} {theirs!r} to be data.{name} {ours!r}"
                )

    @property
    def frame_stride(self) -> int:
        """Frames of the batch per frame of the student (2 when a teacher has tubelets of 2)."""
        return self.data.num_frames // self.student.encoder.num_frames

    def make_stage(self) -> DistillStage:
        """The stage; checks that heads and teachers fit.

        Raises:
          ConfigError: A teacher without heads, heads without a teacher, or sizes that differ.
        """
        return DistillStage(self)


class DistillStage(Stage):
    """Student, teachers and the three-term loss."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.student = Student(config.student)
        self.teachers: dict[str, Teacher] = {
            role: given.make()
            for role, given in (("clip", config.clip_teacher), ("mae", config.mae_teacher))
            if given is not None
        }
        if not self.teachers:
            raise ConfigError("config.clip_teacher or config.mae_teacher must be given")
        for role, heads in (("clip", config.student.clip), ("mae", config.student.mae)):
            self._check_heads(role, heads)
        self._check_final()
        if config.mask.kind == "attention" and self._guide_grid() is None:
            raise ConfigError(
                f"mask.kind 'attention' needs a saliency map, and the {config.mask.guide} teacher "
                "has none; set mask.kind=uniform or mask.guide"
            )

    def _check_heads(self, role: str, heads: AlignmentConfig | None) -> None:
        """Heads and teacher of a role must agree in everything."""
        teacher = self.teachers.get(role)
        if (teacher is None) != (heads is None):
            have, lack = ("heads", "teacher") if teacher is None else ("teacher", "heads")
            raise ConfigError(f"role {role!r} has a {have} config but no {lack}")
        if teacher is None:
            return
        pairs = {
            "width": (heads.width, teacher.width),
            "layers": (len(heads.layers), teacher.num_layers),
            "has_cls": (heads.has_cls, teacher.has_cls),
            "grid": (heads.grid or self.config.student.encoder.grid, self._grid(role)),
        }
        for name, (ours, theirs) in pairs.items():
            if (tuple(ours) if name == "grid" else ours) != theirs:
                raise ConfigError(
                    f"student.{role}.{name} gives {ours}, but teacher "
                    f"{getattr(self.config, f'{role}_teacher').name} gives {theirs}"
                )

    def _check_final(self) -> None:
        """The final feature is the clip teacher's pooled one."""
        width = self.config.student.final_width
        theirs = self.teachers["clip"].pooled_width if "clip" in self.teachers else 0
        if width and width != theirs:
            raise ConfigError(
                f"student.final_width is {width}, but the clip teacher pools to {theirs}"
            )

    def _frames(self, role: str) -> int:
        """Frames that a teacher sees: the student's, or all of the batch."""
        return (
            self.config.student.encoder.num_frames
            if role == "clip"
            else self.config.data.num_frames
        )

    def _grid(self, role: str) -> tuple[int, int, int]:
        return self.teachers[role].grid(self._frames(role), self.config.student.encoder.image_size)

    def _guide_grid(self) -> tuple[int, int, int] | None:
        guide = self.config.mask.guide
        if guide not in self.teachers:
            return None
        size = self.config.student.encoder.image_size
        return self.teachers[guide].saliency_grid(self._frames(guide), size)

    def init_params(self, rng: jax.Array) -> Any:
        """Fresh student parameters (boxed)."""
        encoder = self.config.student.encoder
        size = encoder.image_size
        video = jnp.zeros((1, encoder.num_frames, size, size, 3), jnp.float32)
        visible = jnp.arange(self.tokens_per_clip(), dtype=jnp.int32)[None]
        return self.student.init({"params": rng}, video, visible)["params"]

    def load_frozen(self) -> Any:
        """Weights of the teachers, none when what they give is read."""
        return {} if self.config.teacher_features else self.load_teachers()

    def load_teachers(self) -> Any:
        """Weights of the teachers; teachers that share weights share one copy."""
        return {t.weights_id: t.load() for t in self.teachers.values()}

    def abstract_frozen(self) -> Any:
        """Shapes of `load_frozen`."""
        return {} if self.config.teacher_features else self._abstract_teachers()

    def _abstract_teachers(self) -> Any:
        """Shapes of `load_teachers`, with logical axis names."""
        return {
            teacher.weights_id: jax.eval_shape(teacher.boxed_init, jax.random.key(0))
            for teacher in self.teachers.values()
        }

    def abstract_batches(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One kind; see the module's docstring."""
        size, frames = self.config.student.encoder.image_size, self.config.data.num_frames
        batch = {"video": jax.ShapeDtypeStruct((batch_size, frames, size, size, 3), jnp.uint8)}
        if self._loader_masks:
            shape = (batch_size, self.tokens_per_clip())
            batch["visible"] = jax.ShapeDtypeStruct(shape, jnp.int32)
        if self.config.teacher_features:
            weights = meta.unbox(self._abstract_teachers())
            outputs = jax.eval_shape(self.teach, weights, batch["video"])
            batch |= jax.eval_shape(stored.pack, outputs)
        return {"": batch}

    @property
    def _loader_masks(self) -> bool:
        return self.config.mask.kind in ("tube", "random")

    def tokens_per_clip(self, kind: str = "") -> int:
        """Visible tokens, class token included."""
        draws = self.config.student.encoder.grid[0] if self.config.mask.scope == "frame" else 1
        return 1 + draws * self._visible_per_draw()

    def _visible_per_draw(self) -> int:
        """Visible patches of a frame, or of the clip when the mask is drawn over all of it."""
        frames, height, width = self.config.student.encoder.grid
        count = height * width * (1 if self.config.mask.scope == "frame" else frames)
        return masking.num_visible(count, self.config.mask.ratio)

    def loss_fn(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Metrics]:
        """Sum of the weighted terms, each a mean of 2 - 2 cos over layers, clips and tokens."""
        mask_rng, drop_rng = jax.random.split(rng)
        video = batch["video"]
        read = self.config.teacher_features
        outputs = stored.unpack(batch, self.teachers) if read else self.teach(frozen, video)
        if self._loader_masks:
            visible = batch["visible"]
        else:
            visible = self.draw_visible(self.saliency(outputs, len(video)), mask_rng)
        student = self.student.apply(
            {"params": params},
            self.config.student.encoder.normalize(video[:, :: self.config.frame_stride]),
            visible,
            train=train,
            rngs={"droppath": drop_rng},
        )
        terms = self._terms(student, outputs, visible)
        weights = self.config.loss
        loss = sum(getattr(weights, name) * value for name, value in terms.items())
        return loss, {f"loss_{name}": value for name, value in terms.items()}

    def teach(self, frozen: Any, video: jax.Array) -> dict[str, TeacherOutput]:
        """Runs the teachers.

        Args:
          frozen: Weights by `weights_id`.
          video: (B, T, H, W, 3) uint8.

        Returns:
          Role -> output.
        """
        stride = self.config.frame_stride
        outputs = {}
        for role, teacher in self.teachers.items():
            frames = video[:, ::stride] if role == "clip" else video
            outputs[role] = jax.lax.stop_gradient(teacher(frozen[teacher.weights_id], frames))
        return outputs

    def saliency(self, outputs: dict[str, TeacherOutput], batch_size: int) -> jax.Array:
        """What guides the mask, on the student's grid: (B, T', H'*W') float32, non-negative."""
        config, grid = self.config.mask, self.config.student.encoder.grid
        if config.kind == "uniform":
            return masking.uniform_saliency(batch_size, grid)
        return masking.resize_saliency(outputs[config.guide].saliency, self._guide_grid(), grid)

    def draw_visible(self, saliency: jax.Array, rng: jax.Array) -> jax.Array:
        """Draws the visible tokens of each clip: (B, N_visible) int32, sorted, 0 first."""
        noise = jax.random.exponential(rng, saliency.shape, saliency.dtype)
        return masking.attention_guided_visible(
            saliency, noise, self._visible_per_draw(), scope=self.config.mask.scope
        )

    def _terms(
        self, student: StudentOutput, outputs: dict[str, TeacherOutput], visible: jax.Array
    ) -> dict[str, jax.Array]:
        """The loss terms by name."""
        terms = {}
        heads = {"clip": self.config.student.clip, "mae": self.config.student.mae}
        for role, output in outputs.items():
            aligned, weight = getattr(student, role), getattr(student, f"{role}_weight")
            target = output.tokens
            if heads[role].grid is None or heads[role].grid == self.config.student.encoder.grid:
                target = distillation.gather_targets(target, visible, has_cls=heads[role].has_cls)
            terms[role] = distillation.alignment_loss(aligned, target, weight)
        if student.final is not None:
            terms["final"] = distillation.final_loss(student.final, outputs["clip"].pooled)
        return terms

    def teacher_settings(self) -> dict[str, Any]:
        """All that the teachers' outputs follow from, beside the clips themselves."""
        given = {"clip": self.config.clip_teacher, "mae": self.config.mae_teacher}
        return {
            **{f"data.{name}": getattr(self.config.data, name) for name in VIEW_FIELDS},
            **{f"{role}_teacher": given[role].settings() for role in self.teachers},
            "student_frames": self.config.student.encoder.num_frames,
        }

    def train_batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless training batches from `start_step` on."""
        return self._loader(self.config.data, start_step)

    def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The held-out clips once, in order."""
        if self.config.eval_data is None:
            return (batch for batch in ())
        return self._loader(self.config.eval_data, 0)

    def _loader(self, data: DataConfig, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        if self.config.teacher_features:
            check_settings(self.config.teacher_features, self.teacher_settings())
            data = dataclasses.replace(data, targets=self.config.teacher_features, fixed_view=True)
        if self._loader_masks:
            mask = self.config.mask
            grid = self.config.student.encoder.grid
            data = dataclasses.replace(data, mask=mask.kind, mask_ratio=mask.ratio, mask_grid=grid)
        return make_loader(
            data,
            seed=self.config.seed,
            global_batch=self.config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=start_step,
        )
