"""Dialogues as token ids, places of visual tokens and targets, in rows of one length; NumPy only.

Pieces of `prompts` become ids with a tokenizer that the caller gives. Which token is a target is
known from the piece it came from: nothing is found again by searching or counting in tokenized
text (spec stage3 5).

Terms: a visual token is one of the K rows that the bridge gives for a view; a slot is a place in
the sequence that a visual token fills; a target is a token that the loss asks for.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from iv2_jax.data.prompts import Piece, Template
from iv2_jax.errors import DataError

IGNORE = -100  # target of a position that the loss leaves out

Encode = Callable[[str], Sequence[int]]


class Bos(enum.Enum):
    """Where the token that begins a sequence is put (spec stage3 4.1, trap 15.1)."""

    EVERY_SEGMENT = "every_segment"  # before each text between media: the released `chat()`
    FIRST = "first"  # once, in front
    NONE = "none"  # released instruction tuning of Chat-8B


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The language model's tokenizer, as far as dialogues need it.

    Attributes:
        encode: text to ids; adds no special tokens of its own, but reads those written in the
            text (`</s>`, `[INST]` where it is one) as such.
        bos_id: begins a sequence.
        eos_id: ends an answer.
        pad_id: fills rows up.
    """

    encode: Encode
    bos_id: int
    eos_id: int
    pad_id: int


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


def assemble(
    parts: Sequence[Piece],
    template: Template,
    vocabulary: Vocabulary,
    *,
    tokens_per_view: int,
    bos: Bos = Bos.FIRST,
    train: bool = True,
) -> Example:
    """Turns pieces into ids, slots and targets.

    Neighbouring pieces of the same kind (both targets or both not) are encoded as one text, so a
    prompt without targets is tokenized exactly as the original tokenizes it.

    Args:
        parts: of `pieces`.
        template: that they were written with.
        vocabulary: tokenizer and special ids.
        tokens_per_view: visual tokens of a view.
        bos: where the beginning token goes.
        train: answers are targets; False gives a prompt in which nothing is.

    Returns:
        The example, not padded.

    Raises:
        DataError: the ids of an answer do not end with `eos_id`: the tokenizer does not read the
            stop mark as one token, and a model trained so would never stop.
    """
    tokens: list[int] = []
    visual: list[int] = []
    targets: list[int] = []

    def extend(ids: Sequence[int], *, target: bool) -> None:
        tokens.extend(ids)
        visual.extend([-1] * len(ids))
        targets.extend(ids if target else [IGNORE] * len(ids))

    row, begins = 0, bos is not Bos.NONE
    for piece in _runs(parts, train):
        if piece.num_views:
            count = piece.num_views * tokens_per_view
            tokens.extend([0] * count)
            visual.extend(range(row, row + count))
            targets.extend([IGNORE] * count)
            row += count
            begins = begins or bos is Bos.EVERY_SEGMENT
            continue
        if begins:
            extend([vocabulary.bos_id], target=False)
            begins = False
        text = piece.text.strip() if template.strip else piece.text
        ids = [int(token) for token in vocabulary.encode(text)]
        if piece.target and (not ids or ids[-1] != vocabulary.eos_id):
            raise DataError(
                f"the tokenizer gives {ids[-4:]} for the end of the answer {text[-24:]!r}, not "
                f"eos_id={vocabulary.eos_id}: it must read the stop mark as one special token"
            )
        extend(ids, target=piece.target)
    return Example(*(np.asarray(values, np.int32) for values in (tokens, visual, targets)))


def _runs(parts: Sequence[Piece], train: bool) -> Iterator[Piece]:
    """Joins neighbouring text pieces of one kind; drops empty ones."""
    text, target = "", False
    for piece in parts:
        is_target = piece.target and train
        if text and (piece.num_views or is_target != target):
            yield Piece(text, target)
            text = ""
        if piece.num_views:
            yield piece
        else:
            text, target = text + piece.text, is_target
    if text:
        yield Piece(text, target)


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
