"""TPU slices that are only described: what a program is compiled for where there is no TPU.

The compiler is the `libtpu` wheel (`pip install 'iv2_jax[tpu]'`). It needs to know how the chips of
a slice are wired: an axis whose links close to a ring gathers twice as fast as an open one, and the
compiler chooses other collectives for it. The wiring follows from the shape (Cloud TPU's rule, as
in MaxText's `accelerator_to_spec_map.py`): slices of v4, v5p and v7x made of whole cubes of
4 x 4 x 4 close on every axis, smaller ones on none; an axis of v5e and v6e closes when it has 16
chips.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from iv2_jax.errors import ConfigError, nearest

if TYPE_CHECKING:
    import jax

# Chip -> (libtpu's name of it, its name of the cores' arrangement, edges of a full pod).
_FAMILIES = {
    "v4": ("v4", "megacore_dense", (16, 16, 16)),
    "v5e": ("v5e", "default", (16, 16)),
    "v5p": ("v5", "megacore", (16, 20, 28)),
    "v6e": ("v6e", "default", (16, 16)),
    "v7x": ("tpu7x", "default", (16, 24, 24)),
}
_ALIASES = {"v5": "v5p", "tpu7x": "v7x", "ironwood": "v7x", "trillium": "v6e"}
_LOCK = Path(tempfile.gettempdir()) / "libtpu_lockfile"


@dataclass(frozen=True)
class Topology:
    """A number of equal slices of one kind of chip.

    Attributes:
      chip: "v4", "v5e", "v5p", "v6e" or "v7x".
      shape: Chips along each axis of a slice: two axes for v5e and v6e, three for the others.
      slices: Slices, joined by the data-centre network only.

    Raises:
      ConfigError: The chip is unknown or never comes in such a shape.
    """

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "chip", _ALIASES.get(self.chip, self.chip))
        if self.chip not in _FAMILIES:
            raise ConfigError(f"topology {self}: unknown chip{nearest(self.chip, _FAMILIES)}")
        edges = _FAMILIES[self.chip][2]
        if len(self.shape) != len(edges) or any(n < 1 for n in self.shape):
            raise ConfigError(
                f"topology {self}: {self.chip} has {len(edges)} axes, such as "
                f"{self.chip}:{'x'.join(['4'] * len(edges))}"
            )
        if any(n > most for n, most in zip(sorted(self.shape), sorted(edges), strict=True)):
            most = "x".join(map(str, edges))
            raise ConfigError(f"topology {self}: the largest slice of {self.chip} is {most}")
        if self.slices < 1:
            raise ConfigError(f"topology {self}: --slices must be >= 1, not {self.slices}")

    def __str__(self) -> str:
        """`v5p:8x8x8`, with the number of slices where there are several."""
        name = f"{self.chip}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} x {name}"

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Which axes close to a ring; a third axis of v5e and v6e does not exist."""
        if len(self.shape) == 3:
            closed = all(n % 4 == 0 for n in self.shape)
            return (closed, closed, closed)
        return (self.shape[0] == 16, self.shape[1] == 16, False)

    def devices(self) -> list[jax.Device]:
        """The described devices, slice by slice; programs compile for them and cannot run.

        Raises:
          ConfigError: The `libtpu` wheel is missing, busy, or refuses the shape.
        """
        import importlib.util

        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError("planning needs the TPU compiler: pip install 'iv2_jax[tpu]'")
        from jax.experimental import topologies

        name, arrangement, _ = _FAMILIES[self.chip]
        host = (1, 1, 1) if math.prod(self.shape) == 1 else (2, 2, 1)
        try:
            with quiet():
                described = topologies.get_topology_desc(
                    platform="tpu",
                    topology_name=f"{name}:{'x'.join(map(str, self.shape))}",
                    chip_config_name=arrangement,
                    chips_per_host_bounds=host,
                    num_slices=self.slices,
                    wrap=self.wrap,
                )
        except Exception as error:
            text = str(error).split("\n")[0]
            if "lockfile" in str(error) or "already in use" in str(error):
                raise ConfigError(
                    f"another process holds the TPU compiler ({text}); wait for it to end, or "
                    f"remove {_LOCK} if none is left"
                ) from error
            raise ConfigError(f"libtpu does not describe topology {self}: {text}") from error
        return list(described.devices)


def topology(text: str, slices: int = 1) -> Topology:
    """Reads `v5p:8x8x8`.

    Raises:
      ConfigError: It is not of that form, or there is no such slice.
    """
    chip, colon, shape = text.lower().partition(":")
    edges = shape.split("x")
    if not colon or not all(edge.isdigit() for edge in edges):
        raise ConfigError(f"topology {text!r} is not CHIP:SHAPE, such as v5p:8x8x8 or v5e:16x16")
    return Topology(chip, tuple(map(int, edges)), slices)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the TPU compiler from looking for a TPU, and from saying that there is none.

    It writes to the process's standard error itself, past Python's logging; what is written there
    inside is shown only when an exception leaves the block. Loading it as root gives the process a
    real-time priority, before which everything else on the machine would wait: it is put back.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask a cloud that is not there
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it compiles only, holds no chip
    with tempfile.TemporaryFile() as written:
        saved = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(saved, 2)
            written.seek(0)
            os.write(2, written.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
