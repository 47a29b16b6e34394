"""Token sequences with places of visual tokens and targets, in rows of one length; NumPy only.

Terms: a visual token is one of the K rows that the bridge gives for a view; a slot is a place in
the sequence that a visual token fills; a target is a token that the loss asks for.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np

from iv2_jax.errors import DataError

IGNORE = -100  # target of a position that the loss leaves out


class Bos(enum.Enum):
    """Where the token that begins a sequence is put (spec stage3 4.1, trap 15.1)."""

    EVERY_SEGMENT = "every_segment"  # before each text between media: the released `chat()`
    FIRST = "first"  # once, in front
    NONE = "none"  # released instruction tuning of Chat-8B


@dataclasses.dataclass(frozen=True)
class Example:
    """One dialogue as ids.

    Attributes:
        tokens: int32 `(L,)`; 0 at slots, where the number means nothing.
        visual_index: int32 `(L,)`; row of the sample's visual tokens that fills the slot (views
            one after the other), -1 at text.
        targets: int32 `(L,)`; the token itself where the loss asks for it, else `IGNORE`. Not
            shifted: position i holds token i.
    """

    tokens: np.ndarray
    visual_index: np.ndarray
    targets: np.ndarray

    @property
    def length(self) -> int:
        """Positions of the sequence."""
        return len(self.tokens)


def pad_batch(
    examples: Sequence[Example], length: int, pad_id: int, *, left: bool = False
) -> dict[str, np.ndarray]:
    """Stacks examples into rows of one length.

    Args:
        examples: B examples; longer ones are cut on the right.
        length: positions L of a row.
        pad_id: token of padding.
        left: pad on the left, as generation in batches needs.

    Returns:
        `tokens`, `visual_index`, `targets` int32 `(B, L)` and `mask` bool `(B, L)`, False on
        padding.

    Raises:
        DataError: a row has no room for all the visual tokens of its example, or a row to be
            padded on the left is too long for a prompt to be cut.
    """
    shape = (len(examples), length)
    batch = {
        "tokens": np.full(shape, pad_id, np.int32),
        "visual_index": np.full(shape, -1, np.int32),
        "targets": np.full(shape, IGNORE, np.int32),
        "mask": np.zeros(shape, bool),
    }
    for row, example in enumerate(examples):
        num_visual = int((example.visual_index >= 0).sum())
        if num_visual > (example.visual_index[:length] >= 0).sum():
            raise DataError(
                f"example {row} has {num_visual} visual tokens within {example.length} positions; "
                f"rows of length={length} do not hold them"
            )
        if left and example.length > length:
            raise DataError(f"prompt {row} has {example.length} positions, length={length} fewer")
        count = min(example.length, length)
        place = slice(length - count, length) if left else slice(count)
        for name in ("tokens", "visual_index", "targets"):
            batch[name][row, place] = getattr(example, name)[:count]
        batch["mask"][row, place] = True
    return batch


def bucket_length(
    examples: Sequence[Example], buckets: Sequence[int] = (256, 512, 1024, 2048)
) -> int:
    """The smallest bucket that holds every example, else the largest (spec stage3 5.4)."""
    longest = max(example.length for example in examples)
    return min((b for b in buckets if b >= longest), default=max(buckets))
