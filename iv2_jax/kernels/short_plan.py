"""How attention over a short sequence is cut into steps that fit a TPU's on-chip memory.

Arithmetic only: `choice.py` asks here whether `short_tpu.py` can do an attention, without loading
Pallas for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LANES = 128
MAX_LENGTH = 4352  # the longest that was compiled is 4097
# On-chip memory (VMEM) of a core by kind of device, MiB: jax/_src/pallas/mosaic/tpu_info.py.
_VMEM_MIB = {
    "TPU v4": 16,
    "TPU v5 lite": 128,
    "TPU v5e": 128,
    "TPU v5": 64,
    "TPU v5p": 64,
    "TPU v6 lite": 128,
    "TPU v6e": 128,
    "TPU7x": 64,
}
_LEAST_VMEM_MIB = 16  # where the kind is not known: what every generation has
# Share of it that a step may take; the rest is left to what the compiler keeps there itself.
_SHARE = 0.9
# Arrays of scores that are alive at once in the backward pass: two to four as compiled for v5p and
# v6e. The forward pass may have more, and has three blocks less.
_LIVE_SCORES = 5
_SLACK = 1 << 20
# Rows of queries whose scores are computed at once; all of them up to so many scores.
_SCORES_AT_ONCE = 512 * 512
_QUERY_ROWS = (256, 128)
LEAST_ROWS = 16  # fewer are left to the tile before
# A step's own cost is small beside that of so many heads; more would only take memory.
_ENOUGH_HEADS = 8


@dataclass(frozen=True)
class Steps:
    """The cut of one attention; hashable, so that it can be static under `jit`.

    Attributes:
      heads: Query heads of one step.
      groups: Key heads of one step.
      folded: Arrays stay `(B, N, heads x head size)`, as they lie in memory, instead of having
        heads brought to the front.
      rows: Queries whose scores are computed at once.
      buffers: 2: the next step's arrays are loaded and the last one's stored meanwhile; 1: not.
      vmem: Bytes of on-chip memory that the compiler may give a step.
    """

    heads: int
    groups: int
    folded: bool
    rows: int
    buffers: int
    vmem: int


def vmem_bytes(device_kind: str | None, interpret: bool = False) -> int:
    """On-chip memory of one core; of the smallest generation where the kind is not known.

    Interpreted step by step, a kernel is in no chip's memory: then it is the largest's.
    """
    if interpret:
        return max(_VMEM_MIB.values()) << 20
    return _VMEM_MIB.get(device_kind or "", _LEAST_VMEM_MIB) << 20


def plan(
    queries: int,
    keys: int,
    heads: int,
    groups: int,
    head_dim: int,
    *,
    itemsize: int,
    causal: bool,
    vmem: int,
) -> Steps | None:
    """The cut with as many heads a step as fit, without a transposition where possible.

    Args:
        queries: N.
        keys: M.
        heads: query heads of one device.
        groups: key heads of one device, dividing `heads`.
        head_dim: size of a head.
        itemsize: bytes of an element of queries, keys and values.
        causal: tiles that no query sees are left out, if they are small enough to be.
        vmem: bytes of on-chip memory of the chip.

    Returns:
        None when nothing fits.
    """
    rows = [r for r in _QUERY_ROWS if r < queries]
    if not rows or (queries * keys <= _SCORES_AT_ONCE and not causal):
        rows.insert(0, queries)
    # A step that waits for its own arrays costs less than transposing them in HBM: at 2049 tokens
    # they take a twentieth of its time.
    for folded, buffers in ((True, 2), (True, 1), (False, 2)):
        for step in _group_counts(groups, head_dim, folded, heads // groups):
            for r in rows:
                own = step * (heads // groups)
                need = _need(queries, keys, own, step, head_dim, itemsize, folded, r, buffers)
                if need <= _SHARE * vmem:
                    return Steps(own, step, folded, r, buffers, need)
    return None


def _group_counts(groups: int, head_dim: int, folded: bool, sharing: int) -> list[int]:
    """Key heads that a step may take, best first.

    A block of folded heads must be whole lanes wide, or all there are.
    """
    fits = [
        n
        for n in range(1, groups + 1)
        if groups % n == 0 and (not folded or n == groups or n * head_dim % LANES == 0)
    ]
    few = [n for n in fits if n * sharing <= _ENOUGH_HEADS]
    many = [n for n in fits if n * sharing > _ENOUGH_HEADS]
    return few[::-1] + many


def _need(
    queries: int,
    keys: int,
    heads: int,
    groups: int,
    head_dim: int,
    itemsize: int,
    folded: bool,
    rows: int,
    buffers: int,
) -> int:
    """Bytes of on-chip memory of a step of the backward pass, the larger of both."""

    def block(length: int, count: int) -> int:
        """One array, padded to the chip's tiles."""
        width = _up(count * head_dim, LANES) if folded else count * _up(head_dim, LANES)
        return _up(length, 32 // itemsize) * width * itemsize

    # Queries and two gradients of their size, keys, values and theirs.
    blocks = buffers * (3 * block(queries, heads) + 4 * block(keys, groups))
    # One head of each, and float32 sums of two.
    stages = 3 * block(queries, 1) + 4 * block(keys, 1)
    sums = 2 * _up(keys, 8) * _up(head_dim, LANES) * 4
    left = queries % rows
    largest = rows + left if left < LEAST_ROWS else rows
    scores = _LIVE_SCORES * _up(keys, 8) * _up(largest, LANES) * 4
    return blocks + stages + sums + scores + _SLACK


def _up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
