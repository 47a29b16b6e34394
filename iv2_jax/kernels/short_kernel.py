"""What the kernel of `short_tpu.py` does on the chip: the heads of one clip, one after another."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from iv2_jax.kernels import short_plan
from iv2_jax.kernels.plain import MASKED_SCORE

_TILES_UNROLLED = 4  # more of them are a loop of the chip


@dataclass(frozen=True)
class Case:
    """What the kernels are compiled for, beside shapes; hashable.

    Attributes:
      steps: How it is cut.
      queries: N.
      keys: M.
      heads: Query heads.
      groups: Key heads.
      head_dim: Size of a head.
      scale: Factor of the scores.
      causal: Query i sees keys 0..i.
      interpret: Run step by step in XLA.
    """

    steps: short_plan.Steps
    queries: int
    keys: int
    heads: int
    groups: int
    head_dim: int
    scale: float
    causal: bool
    interpret: bool

    @property
    def is_staged(self) -> bool:
        """Whether heads begin within the lanes of a tile and are copied out before use."""
        return self.steps.folded and self.head_dim % short_plan.LANES > 0

    @property
    def adds_up(self) -> bool:
        """Whether gradients of a key head come in several parts."""
        return self.heads > self.groups or self.steps.rows < self.queries


class Tile(NamedTuple):
    """Scores that are computed at once: of `rows` queries from `start`, with keys up to `seen`.

    `start` may be known on the chip only.
    """

    start: Any
    rows: int
    seen: int

    @property
    def queries(self) -> Any:
        """The queries in an array of all."""
        start = self.start
        start = start if isinstance(start, int) else pl.multiple_of(start, short_plan.LANES)
        return pl.ds(start, self.rows)


def tiles(case: Case) -> list[Tile]:
    """Tiles that cover all scores; of few, a causal mask leaves those out that no query sees."""
    cut, start = [], 0
    while start < case.queries:
        stop = start + case.steps.rows
        stop = stop if stop + short_plan.LEAST_ROWS <= case.queries else case.queries
        cut.append(Tile(start, stop - start, stop if case.causal else case.keys))
        start = stop
    if len(cut) > _TILES_UNROLLED:
        cut = [tile._replace(seen=case.keys) for tile in cut]
    return cut


# The rest runs on the chip: a `ref` is a block or a part of one in its memory.


def forward(case: Case, num_ids: int, *refs: Any) -> None:
    """Writes the output of a step; scores are (queries, keys)."""
    arrays, ids, (out_ref,), stages = _split(refs, 3, num_ids, 1)
    key_ids = ids[0][0] if ids else None
    *stages, out_stage = stages or (None,) * 4

    def of_head(head: Any, k: jax.Array, v: jax.Array) -> None:
        q_ref, out = _head(case, arrays[0], stages[0], head), _part(case, out_ref, out_stage, head)

        def of_tile(tile: Tile) -> None:
            q = _scaled(case, q_ref[tile.queries])
            scores = _product(q, k[: tile.seen], _TRANSPOSED)
            query_ids = _column(ids[1][0, :, tile.queries]) if len(ids) > 1 else None
            visible = _visible(case, tile, scores.shape, key_ids, query_ids, keys_axis=1)
            weights, total = _softmax(scores, visible, bool(ids), keys_axis=1)
            mixed = _product(weights.astype(v.dtype), v[: tile.seen]) * total
            out[tile.queries] = mixed.astype(out.dtype)

        _for_each_tile(case, of_tile)
        _write_back(case, out_ref, out_stage, head)

    def of_group(group: Any) -> None:
        k, v = (_head(case, arrays[i], stages[i], group)[...] for i in (1, 2))
        _for_each_head(case, group, lambda head: of_head(head, k, v))

    _for_each(case.steps.groups, of_group)


def backward(case: Case, num_ids: int, *refs: Any) -> None:
    """Writes the gradients of a step; scores are (keys, queries).

    In this orientation keys' and values' gradients are plain products, and only keys and a head's
    gradient of queries are turned, never anything of the scores' size.
    """
    arrays, ids, results, scratch = _split(refs, 4, num_ids, 3)
    stages = scratch[:7] if case.is_staged else (None,) * 7
    sums = scratch[-2:] if case.adds_up else ()
    key_ids = _column(ids[0][0]) if ids else None

    def gradients(
        tile: Tile, q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gradients of scaled queries (turned), of keys and of values; float32."""
        scores = _product(k, q, _TRANSPOSED)
        query_ids = ids[1][0, :, tile.queries] if len(ids) > 1 else None
        visible = _visible(case, tile, scores.shape, key_ids, query_ids, keys_axis=0)
        weights, total = _softmax(scores, visible, bool(ids), keys_axis=0)
        weights = weights * total
        dv = _product(weights.astype(v.dtype), grad)
        d_weights = _product(v, grad, _TRANSPOSED)
        mean = jnp.sum(weights * d_weights, axis=0, keepdims=True)
        d_scores = (weights * (d_weights - mean)).astype(q.dtype)
        return _product(k.T, d_scores), _product(d_scores, q), dv

    def of_head(group: Any, head: Any, k: jax.Array, v: jax.Array) -> None:
        q_ref, grad_ref = (_head(case, arrays[i], stages[i], head) for i in (0, 3))
        dq_ref = _part(case, results[0], stages[4], head)

        def of_tile(tile: Tile) -> None:
            seen = slice(tile.seen)
            q, grad = _scaled(case, q_ref[tile.queries]), grad_ref[tile.queries]
            dq, *parts = gradients(tile, q, k[seen], v[seen], grad)
            dq_ref[tile.queries] = (dq * case.scale).T.astype(dq_ref.dtype)
            for i, part in enumerate(parts):
                if sums:
                    sums[i][seen] += part
                else:
                    out = _part(case, results[1 + i], stages[5 + i], group)
                    out[...] = part.astype(out.dtype)

        _for_each_tile(case, of_tile)
        _write_back(case, results[0], stages[4], head)

    def of_group(group: Any) -> None:
        k, v = (_head(case, arrays[i], stages[i], group)[...] for i in (1, 2))
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)
        _for_each_head(case, group, lambda head: of_head(group, head, k, v))
        for i, ref in enumerate(sums):
            out = _part(case, results[1 + i], stages[5 + i], group)
            out[...] = ref[...].astype(out.dtype)
        for i in (1, 2):
            _write_back(case, results[i], stages[4 + i], group)

    _for_each(case.steps.groups, of_group)


def _split(refs: Sequence[Any], *counts: int) -> list[Sequence[Any]]:
    """So many of each kind, and the rest."""
    ends = list(itertools.accumulate(counts))
    return [refs[a:b] for a, b in zip([0, *ends], [*ends, len(refs)], strict=True)]


def _for_each(count: int, body: Callable[[Any], None]) -> None:
    """Runs `body(0)`, `body(1)`, ... in a loop of the chip: unrolled, programs would be large."""
    if count == 1:
        body(0)
        return
    jax.lax.fori_loop(0, count, lambda i, carry: (body(i), carry)[1], 0)


def _for_each_head(case: Case, group: Any, body: Callable[[Any], None]) -> None:
    """The query heads of a step that read a key head."""
    sharing = case.steps.heads // case.steps.groups
    _for_each(sharing, lambda i: body(group * sharing + i))


def _for_each_tile(case: Case, body: Callable[[Tile], None]) -> None:
    """Runs `body` for each tile; many alike ones in a loop, and what is left after it."""
    every = tiles(case)
    first, alike = every[0], 0
    if len(every) > _TILES_UNROLLED:
        alike = sum(tile.rows == first.rows for tile in every)
        _for_each(alike, lambda i: body(first._replace(start=i * first.rows)))
    for tile in every[alike:]:
        body(tile)


def _part(case: Case, ref: Any, stage: Any, head: Any) -> Any:
    """Where the tokens of a head are read and written, `(length, head_dim)`."""
    if case.is_staged:
        return stage
    if not case.steps.folded:
        return ref.at[0, head]
    start = head * case.head_dim
    start = start if isinstance(start, int) else pl.multiple_of(start, short_plan.LANES)
    return ref.at[0, :, pl.ds(start, case.head_dim)]


def _head(case: Case, ref: Any, stage: Any, head: Any) -> Any:
    """As `_part`, with the tokens there."""
    if case.is_staged:

        def fetch(lanes: slice) -> None:
            stage[...] = ref[0, :, lanes]

        _at_lanes(case, ref, head, fetch)
    return _part(case, ref, stage, head)


def _write_back(case: Case, ref: Any, stage: Any, head: Any) -> None:
    """Brings what was written to `_part` to its block."""
    if case.is_staged:

        def store(lanes: slice) -> None:
            ref[0, :, lanes] = stage[...]

        _at_lanes(case, ref, head, store)


def _at_lanes(case: Case, ref: Any, head: Any, copy: Callable[[slice], None]) -> None:
    """Runs `copy` with the lanes of a head; which may start anywhere, so each has its own code."""
    width = case.head_dim
    for i in range(ref.shape[2] // width):
        run = functools.partial(copy, slice(i * width, (i + 1) * width))
        if isinstance(head, int):
            if head == i:
                run()
        else:
            pl.when(head == i)(run)


_TRANSPOSED = (((1,), (1,)), ((), ()))  # a b^T
_PLAIN = (((1,), (0,)), ((), ()))  # a b


def _product(a: jax.Array, b: jax.Array, dims: Any = _PLAIN) -> jax.Array:
    """A matrix product with float32 sums."""
    if 1 in (*a.shape, *b.shape):  # the compiler multiplies element by element, in float32 only
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _scaled(case: Case, q: jax.Array) -> jax.Array:
    return (q.astype(jnp.float32) * case.scale).astype(q.dtype)


def _column(row: jax.Array) -> jax.Array:
    """(1, n) as (n, 1); a whole tile of rows is turned, as the chip does it."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _visible(
    case: Case,
    tile: Tile,
    shape: tuple[int, ...],
    key_ids: jax.Array | None,
    query_ids: jax.Array | None,
    keys_axis: int,
) -> jax.Array | None:
    """Which scores of a tile count, or None for all.

    Args:
        case: says whether a causal mask does.
        tile: where the scores are.
        shape: theirs.
        key_ids: of all keys, a row or a column as the scores have keys; None if all count.
        query_ids: of the tile's queries, the other way; None if any key will do.
        keys_axis: axis of keys.
    """
    visible = None
    if key_ids is not None:
        theirs = jax.lax.slice_in_dim(key_ids, 0, tile.seen, axis=keys_axis)
        theirs = jnp.broadcast_to(theirs, shape)
        own = None if query_ids is None else jnp.broadcast_to(query_ids, shape)
        visible = theirs >= 0 if own is None else theirs == own
    if case.causal:
        query = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - keys_axis) + tile.start
        earlier = jax.lax.broadcasted_iota(jnp.int32, shape, keys_axis) <= query
        visible = earlier if visible is None else visible & earlier
    return visible


def _softmax(
    scores: jax.Array, visible: jax.Array | None, may_be_empty: bool, keys_axis: int
) -> tuple[jax.Array, jax.Array]:
    """Exponentials of scores, and the factor that makes a query's sum to one.

    A query that sees nothing has zeros and a factor of zero, where that `may_be_empty`.
    """
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED_SCORE)
    weights = jnp.exp(scores - jnp.max(scores, axis=keys_axis, keepdims=True))
    if may_be_empty:
        weights = jnp.where(visible, weights, 0.0)
    total = jnp.sum(weights, axis=keys_axis, keepdims=True)
    if may_be_empty:
        return weights, jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    return weights, 1.0 / total
