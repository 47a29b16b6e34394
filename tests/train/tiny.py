"""A stage-1 run small enough for tests: random-projection teachers, a two-block student."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from iv2_jax import config as config_lib
from iv2_jax.models import teachers
from iv2_jax.models.teachers.base import Teacher, TeacherOutput
from iv2_jax.train.distill import DistillConfig

SIZE, FRAMES, WIDTH = 32, 4, 12


@dataclasses.dataclass(frozen=True)
class TinyTeacher(Teacher):
    """Random projections of the mean colour of each cell.

    Attributes:
      cells: Cells a side.
      tubelet: Frames that share a token.
      cls: Give a class token.
      salient: Give a saliency map.
    """

    cells: int = 4
    tubelet: int = 1
    cls: bool = True
    salient: bool = True

    width, num_layers, pooled_width = WIDTH, 2, 6

    @property
    def has_cls(self) -> bool:
        return self.cls

    @property
    def weights_id(self) -> str:
        return f"tiny{self.tubelet}"

    def grid(self, num_frames, image_size):
        return (num_frames // self.tubelet, self.cells, self.cells)

    def saliency_grid(self, num_frames, image_size):
        return self.grid(num_frames, image_size) if self.salient else None

    def init(self, rng):
        a, b = jax.random.split(rng)
        layers = jax.random.normal(a, (self.num_layers, 3, self.width))
        return {"layers": layers, "pool": jax.random.normal(b, (3, self.pooled_width))}

    def load(self) -> Any:
        return jax.device_get(self.init(jax.random.key(7)))

    def __call__(self, params, video):
        x = video.astype(jnp.float32) / 255 - 0.4
        b, t, h, w, _ = x.shape
        n, k = self.cells, t // self.tubelet
        x = x.reshape(b, k, self.tubelet, n, h // n, n, w // n, 3).mean((2, 4, 6))
        cells = x.reshape(b, -1, 3)
        if self.cls:
            cells = jnp.concatenate([cells.mean(1, keepdims=True), cells], axis=1)
        tokens = jnp.einsum("bnc,kcd->kbnd", cells, params["layers"])
        pooled = x.mean((1, 2, 3)) @ params["pool"]
        saliency = jnp.abs(x).sum(-1).reshape(b, k, n * n) if self.salient else None
        unit = lambda v: v / jnp.linalg.norm(v, axis=-1, keepdims=True)  # noqa: E731
        return TeacherOutput(unit(tokens), unit(pooled), saliency)


def register(monkeypatch) -> None:
    """Makes the teacher known as `tiny`."""
    monkeypatch.setitem(teachers.TEACHERS, "tiny", "tests.train.tiny:TinyTeacher")


def values(**changes: Any) -> dict[str, Any]:
    """A run with both branches and the final feature, on the student's own grid."""
    heads = {"width": WIDTH, "layers": [0, 1], "decoder": "linear"}
    return {
        "stage": "distill",
        "steps": 4,
        "batch_size": 8,
        "student": {
            "encoder": {
                "width": 16,
                "depth": 2,
                "num_heads": 2,
                "mlp_width": 32,
                "patch_size": 8,
                "image_size": SIZE,
                "num_frames": FRAMES,
                "pool_heads": 2,
                "pool_width": 8,
                "layer_scale_init": 0.5,
                "drop_path_rate": 0.2,
            },
            "clip": heads | {"has_cls": True},
            "mae": heads | {"has_cls": False, "decoder": "mlp"},
            "final_width": 6,
            "final_decoder": "linear",
        },
        "clip_teacher": {"name": "tiny"},
        "mae_teacher": {"name": "tiny", "options": {"tubelet": 2, "cls": False}},
        "mask": {"ratio": 0.5},
        "data": {"source": "unused", "num_frames": 2 * FRAMES, "size": SIZE},
        "optimizer": {"lr": 1e-2, "scale_lr_by_batch": False},
        "mesh": {"max_devices": 1},
        "tensorboard": False,
    } | changes


def config(**changes: Any) -> DistillConfig:
    """`values` as a checked config."""
    return config_lib.build(DistillConfig, values(**changes))
