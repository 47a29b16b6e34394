"""Tells what a weight file really is: its keys and shapes against every model of the zoo."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iv2_jax.interop import entries as entries_lib
from iv2_jax.interop import families
from iv2_jax.models import kinds, zoo

# What may stand before the keys of a model within a larger file.
PREFIXES = (
    "",
    "module.",
    "model.",
    "encoder.",
    "vision_encoder.",
    "vision_model.",
    "text_encoder.",
)
_ENOUGH = 0.5  # share of keys in common below which a file is called unknown


@dataclasses.dataclass(frozen=True)
class Match:
    """How well a file fits a model.

    Attributes:
        name: the model's name in the zoo.
        prefix: what stands before the model's keys in the file.
        fitting: keys of the model that the file has in the same shape.
        misshaped: keys of the model that the file has in another shape.
        wanted: keys of the model.
        extra: keys of the file that the model neither has nor ignores.
        aside: keys of the file that the model ignores, or that do not start with the prefix; they
            speak for another model by half.
    """

    name: str
    prefix: str
    fitting: int
    misshaped: tuple[str, ...]
    wanted: int
    extra: int
    aside: int

    @property
    def score(self) -> float:
        """Share of the keys of either side that fit; 1 for a complete file of the model."""
        return self.fitting / self._total

    @property
    def _total(self) -> float:
        """Keys of either side."""
        return max(1, self.wanted + self.extra + self.aside / 2)

    @property
    def common(self) -> float:
        """The same by names alone, whatever the shapes."""
        return (self.fitting + len(self.misshaped)) / self._total


def identify(tensors: Mapping[str, Any], names: Sequence[str] | None = None) -> list[Match]:
    """Compares a file with models, by keys and shapes alone.

    Args:
        tensors: `{key: anything with a shape}`.
        names: models of the zoo; None takes all but those for tests.

    Returns:
        The matches with any key in common, best first: by fitting keys, then by keys in common.
    """
    shapes = {key: tuple(np.shape(value)) for key, value in tensors.items()}
    if names is None:
        names = [name for name in zoo.names() if not name.startswith("test_")]
    stripped = {}
    for prefix in PREFIXES:
        kept = {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}
        if kept:
            stripped[prefix] = kept
    found = [match for name in names for match in _matches(name, stripped, len(shapes))]
    return sorted(found, key=lambda m: (-m.score, -m.common, -m.fitting, len(m.prefix)))


def explain(tensors: Mapping[str, Any], asked: str | None = None) -> str:
    """Says in one line what a file is.

    Args:
        tensors: as in `identify`.
        asked: the model that was asked for.

    Returns:
        Such as "the file is internvideo2_large_pretrain (...), you asked for ...", or "" where
        nothing can be told.
    """
    # Who asks for a test model has files of test models.
    matches = identify(tensors, zoo.names() if (asked or "").startswith("test_") else None)
    if not matches or matches[0].common < _ENOUGH:
        return ""
    best = matches[0]
    what = f"{best.name} ({kinds.of(zoo.get(best.name)).what})"
    under = f" under the prefix {best.prefix!r}" if best.prefix else ""
    if best.score < 1 - 1e-9:
        text = f"the file is most like {what}{under}: {_difference(best)}"
    else:
        text = f"the file is a whole {what}{under}"
    if asked and asked != best.name:
        text += f"; you asked for {asked}"
    elif asked and best.prefix:
        text += f"; --prefix {best.prefix} takes it off"
    return text


def _matches(name: str, stripped: Mapping[str, Mapping[str, Any]], total: int) -> list[Match]:
    """Matches of one model, for each prefix under which the file has keys of it."""
    config = zoo.get(name)
    family = families.of(config)
    entries = family.entries(config)
    wanted = entries_lib.torch_shapes(entries)
    found = []
    for prefix, shapes in stripped.items():
        common = wanted.keys() & shapes.keys()
        if not common:
            continue
        ignorable = [re.compile(pattern) for pattern in family.ignorable()]
        others = shapes.keys() - wanted.keys()
        ignored = sum(any(p.fullmatch(key) for p in ignorable) for key in others)
        misshaped = tuple(sorted(key for key in common if shapes[key] != wanted[key]))
        found.append(
            Match(
                name,
                prefix,
                fitting=len(common) - len(misshaped),
                misshaped=misshaped,
                wanted=len(wanted),
                extra=len(others) - ignored,
                aside=ignored + total - len(shapes),
            )
        )
    return found


def _difference(match: Match) -> str:
    """What keeps a file from fitting a model."""
    missing = match.wanted - match.fitting - len(match.misshaped)
    parts = [
        f"{match.fitting} of {match.wanted} tensors fit",
        f"{missing} missing" if missing else "",
        f"{match.extra} unexpected" if match.extra else "",
    ]
    if match.misshaped:
        shown = ", ".join(match.misshaped[:3])
        more = f" and {len(match.misshaped) - 3} more" if len(match.misshaped) > 3 else ""
        parts.append(f"of another shape: {shown}{more}")
        if all("pos_embed" in key for key in match.misshaped):
            parts.append("which is another number of frames or another resolution")
        elif all(key.startswith("head.") for key in match.misshaped):
            parts.append("which is another number of classes")
    return ", ".join(part for part in parts if part)
