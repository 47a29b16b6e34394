"""Any teacher with its kernels in int8, rounded once when it is loaded."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import int8
from iv2_jax.models.teachers.base import Teacher, TeacherOutput

# The pool's attention draws the masks: it stays as it is, and so does its share of the pooled
# feature. Both are a layer's work of forty.
_FLOAT = r"(.*/)?pool/.*"


@dataclasses.dataclass(frozen=True)
class Int8Teacher(Teacher):
    """A teacher whose matrices are int8: half the memory of bfloat16.

    Norms, softmax, biases, positions, the patch embedding and the pool stay as they are.

    Attributes:
        teacher: the teacher as it is.
        products: round inputs too, token by token, so that products are of int8 by int8; else
            kernels are taken back to the compute dtype.
        keep: patterns of paths (`blocks/mlp/fc2/kernel`) of kernels that stay as they are.

    Raises:
        ConfigError: the library is not installed, the teacher has no matrices, or a pattern
            matches none.
    """

    teacher: Teacher
    products: bool = True
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        int8.require_library("a teacher's int8")
        self._chosen()

    @property
    def weights_id(self) -> str:
        """The teacher's, and what is done to the weights."""
        kept = "".join(f",{pattern}" for pattern in self.keep)
        return f"{self.teacher.weights_id}:int8{'' if self.products else ' weights'}{kept}"

    @property
    def has_cls(self) -> bool:
        """The teacher's."""
        return self.teacher.has_cls

    @property
    def width(self) -> int:
        """The teacher's."""
        return self.teacher.width

    @property
    def num_layers(self) -> int:
        """The teacher's."""
        return self.teacher.num_layers

    @property
    def pooled_width(self) -> int:
        """The teacher's."""
        return self.teacher.pooled_width

    def grid(self, num_frames: int, image_size: int) -> tuple[int, int, int]:
        """The teacher's."""
        return self.teacher.grid(num_frames, image_size)

    def saliency_grid(self, num_frames: int, image_size: int) -> tuple[int, int, int] | None:
        """The teacher's."""
        return self.teacher.saliency_grid(num_frames, image_size)

    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """Those that are int8."""
        return self._chosen()

    def init(self, rng: jax.Array) -> Any:
        """Random parameters, rounded."""
        return meta.unbox(self.boxed_init(rng))

    def boxed_init(self, rng: jax.Array) -> Any:
        """Random parameters, rounded, with the teacher's logical axis names."""
        return self._round(self.teacher.boxed_init(rng), int8.quantize_boxed)

    def load(self) -> Any:
        """Reads the trained weights and rounds them."""
        return self.rounded(self.teacher.load())

    def rounded(self, params: Any) -> Any:
        """Host arrays of the teacher's parameters with the chosen kernels rounded."""
        return self._round(params, int8.quantize_host)

    def __call__(self, params: Any, video: jax.Array) -> TeacherOutput:
        """Runs the teacher."""
        return self.teacher(params, video)

    def _round(self, params: Any, quantize: Callable[..., int8.Int8Kernel]) -> Any:
        """A tree whose chosen kernels are `Int8Kernel`."""
        chosen = self._chosen()
        flat = traverse_util.flatten_dict(params, sep="/")
        return traverse_util.unflatten_dict(
            {
                path: quantize(value, *chosen[path], products=self.products)
                if path in chosen
                else value
                for path, value in flat.items()
            },
            sep="/",
        )

    def _chosen(self) -> dict[str, tuple[int, int]]:
        """Paths of the kernels that are int8, with their numbers of input and output axes."""
        found = _matrices(self.teacher)
        for pattern in self.keep:
            if not any(re.fullmatch(pattern, path) for path in found):
                raise ConfigError(
                    f"a teacher's int8_keep: pattern {pattern!r} matches no matrix; there are "
                    f"{sorted(found) or 'none'}"
                )
        floats = (_FLOAT, *self.keep)
        chosen = {
            path: axes
            for path, axes in found.items()
            if not any(re.fullmatch(pattern, path) for pattern in floats)
        }
        if not chosen:
            raise ConfigError(
                f"a teacher's int8: {type(self.teacher).__name__} has no matrix left to round; "
                f"it has {sorted(found) or 'none'}"
            )
        return chosen


@functools.lru_cache(maxsize=16)
def _matrices(teacher: Teacher) -> Mapping[str, tuple[int, int]]:
    """`teacher.matrices()`, which traces a model, once for each teacher."""
    return teacher.matrices()
