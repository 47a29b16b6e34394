"""Labels of clips as class numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iv2_jax.data.records import Clip
from iv2_jax.errors import DataError, nearest


def class_names(clips: Sequence[Clip], label: str) -> tuple[str, ...]:
    """Sorted names of the classes of a label; empty where labels are numbers already.

    Raises:
      DataError: No clip has the label, or some labels are names and some numbers.
    """
    found = {clip.labels[label] for clip in clips if label in clip.labels}
    if not found:
        known = {name for clip in clips for name in clip.labels}
        raise DataError(f"no clip has a label {label!r}{nearest(label, known)}")
    names = {value for value in found if isinstance(value, str)}
    if names and len(names) < len(found):
        number = min(found - names)
        raise DataError(
            f"label {label!r} is a name in some clips ({min(names)!r}) and a number in others "
            f"({number!r}); use one of both throughout"
        )
    return tuple(sorted(names))


def class_numbers(
    clips: Sequence[Clip], label: str, num_classes: int, names: Sequence[str] = ()
) -> np.ndarray:
    """The class of every clip.

    Args:
      clips: The clips; each must have the label.
      label: Name of the label set.
      num_classes: C.
      names: Names of the classes in the order of their numbers, for labels that are names.

    Returns:
      (n,) int32, 0 to C - 1.

    Raises:
      DataError: A clip has no label, or one that is none of the classes; names the clip.
    """
    place = {name: i for i, name in enumerate(names)}
    if names and len(names) != num_classes:
        raise DataError(
            f"label {label!r} has {len(names)} classes, the model {num_classes}: set "
            f"classifier.num_classes={len(names)}, or check `classes`"
        )
    numbers = np.empty(len(clips), np.int32)
    for i, clip in enumerate(clips):
        if label not in clip.labels:
            raise DataError(f"clip {clip.id!r} has no label {label!r}{nearest(label, clip.labels)}")
        value = clip.labels[label]
        if isinstance(value, str):
            if value not in place:
                hint = nearest(value, place) if place else "; no class names are known"
                raise DataError(f"clip {clip.id!r}: {label} {value!r} is no class{hint}")
            value = place[value]
        if not 0 <= value < num_classes:
            raise DataError(
                f"clip {clip.id!r}: {label} {value} is no class of 0 to {num_classes - 1}"
            )
        numbers[i] = value
    return numbers
