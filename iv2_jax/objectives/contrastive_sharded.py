"""The contrastive loss in blocks of scores: gathered (`chunked`) or passed around (`ring`).

Rows `a` stay on their device; columns `b` come to them: some of every device's at a time, gathered
(`chunked`), or all of one device after the other (`ring`). A block of scores serves both directions
of the loss: the rows' running sums stay, the columns' are added up over devices or travel with the
columns and are home after a full round. Backward goes over the blocks once more with the finished
sums, and computes their scores anew. Nothing is kept between the two but the inputs and a few
numbers for each row, so that memory does not grow with the square of the batch; with the ring it
depends on a device's rows alone.

For softmax, with `n` the number of positives of a row and N the rows that count,

    loss = 1/2N sum_i [ lse_j S_ij - mean_positives S_ij + the same over columns ]
    dloss/dS_ij = 1/2N [ exp(S_ij - lse_i) + exp(S_ij - lse_j) - 2 positive_ij / n_i ]

where positives of one id have equal n, so that one count serves both directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from iv2_jax.models.layers import unit_length
from iv2_jax.objectives.layout import RowLayout, row_layout

_BLOCK = 2**21  # scores of a block, 8 MiB
_CHUNKS = 128, 4096  # least and most columns of a block, however many rows there are
_NOTHING = -1e30  # score of a pair that does not count; finite, so that differences are too

_SCALAR = PartitionSpec()


@dataclass(frozen=True)
class _Plan:
    """What is fixed when the loss is traced."""

    layout: RowLayout
    ring: bool
    sigmoid: bool
    chunk_size: int


class _Side(NamedTuple):
    """Rows or columns, with what tells which pairs count: `(R, C)`, int `(R,)`, bool `(R,)`."""

    features: jax.Array
    ids: jax.Array
    valid: jax.Array


class _Sums(NamedTuple):
    """Running sums of rows or columns, float32 `(R,)` each.

    Attributes:
        top: greatest score so far.
        total: sum of exp(score - top); the sigmoid has this alone, the sum of its losses.
        positive: sum of the positives' scores.
        count: number of positives.
    """

    top: jax.Array
    total: jax.Array
    positive: jax.Array
    count: jax.Array


def sharded_contrastive_loss(
    a: jax.Array,
    b: jax.Array,
    temperature: jax.Array | float,
    bias: jax.Array | float,
    ids: jax.Array,
    valid: jax.Array,
    *,
    ring: bool,
    sigmoid: bool,
    chunk_size: int = 0,
) -> jax.Array:
    """The loss of `contrastive.contrastive_loss`, which checks what it is given.

    Args:
        a: `(B, C)` features, before unit length, finite; so is `b`.
        b: `(B, C)` features.
        temperature: scalar.
        bias: scalar of the sigmoid; 0 for softmax.
        ids: int `(B,)`.
        valid: bool `(B,)`.
        ring: pass columns around; otherwise gather them.
        sigmoid: the pairwise loss.
        chunk_size: columns of a block, 0 to choose.

    Returns:
        float32 scalar, the same on every device.

    Raises:
        ConfigError: the rows do not divide over the mesh, or this is called inside a `shard_map`.
    """
    layout = row_layout(a.shape[0], f"form={'ring' if ring else 'chunked'!r}")
    plan = _Plan(layout, ring, sigmoid, chunk_size)
    temperature, bias = (jnp.asarray(x, jnp.float32) for x in (temperature, bias))
    return _loss(plan, a, b, temperature, bias, ids, valid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan: _Plan, *inputs: jax.Array) -> jax.Array:
    """The loss of features, temperature, bias, ids and what counts."""
    return _forward(plan, *inputs)[0]


def _forward(plan: _Plan, *inputs: jax.Array) -> tuple[jax.Array, Any]:
    """The loss, and what backward needs."""
    rows = plan.layout.rows
    loss, sums = _over_devices(
        plan,
        _forward_local,
        in_specs=(rows, rows, _SCALAR, _SCALAR, rows, rows),
        out_specs=(_SCALAR, rows),
    )(*inputs)
    return loss, (inputs, sums)


def _backward(plan: _Plan, kept: Any, gradient: jax.Array) -> tuple[Any, ...]:
    """Gradients of the features, the temperature and the bias."""
    rows = plan.layout.rows
    inputs, sums = kept
    grads = _over_devices(
        plan,
        _backward_local,
        in_specs=(rows, rows, _SCALAR, _SCALAR, rows, rows, rows, _SCALAR),
        out_specs=(rows, rows, _SCALAR, _SCALAR),
    )(*inputs, sums, gradient)
    return (*grads, None, None)


_loss.defvjp(_forward, _backward)


def _over_devices(
    plan: _Plan, local: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`local` on each device's rows; the mesh is the one of the forward pass."""
    local = functools.partial(local, plan)
    if plan.layout.mesh is None:
        return local
    return jax.shard_map(
        local,
        mesh=plan.layout.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,  # the sums over devices below say what is alike on all
    )


def _forward_local(
    plan: _Plan,
    a: jax.Array,
    b: jax.Array,
    temperature: jax.Array,
    bias: jax.Array,
    ids: jax.Array,
    valid: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """One device's part: the loss, and `(R,)` log sums of rows and columns with the counts."""
    rows = _Side(unit_length(a.astype(jnp.float32)), ids, valid)
    visit = functools.partial(_add_scores, plan.sigmoid, rows, temperature, bias)
    columns = (_Side(b, ids, valid), _no_sums(len(a)))
    of_columns, of_rows = _meet(plan, visit, _merge_sums, columns, _no_sums(len(a)))
    number = jnp.maximum(_sum_over_devices(plan, jnp.sum(valid)), 1)
    if plan.sigmoid:
        losses, kept = of_rows.total, ()
    else:
        count = jnp.maximum(of_rows.count, 1.0)
        logs = [jnp.log(x.total) for x in (of_rows, of_columns)]
        # Positives minus the greatest score first: exact where they are the same.
        parts = [
            log + (x.top - x.positive / count)
            for log, x in zip(logs, (of_rows, of_columns), strict=True)
        ]
        losses = (parts[0] + parts[1]) / 2
        kept = (of_rows.top + logs[0], of_columns.top + logs[1], count)
    loss = _sum_over_devices(plan, jnp.sum(jnp.where(valid, losses, 0.0))) / number
    return loss, kept


def _backward_local(
    plan: _Plan,
    a: jax.Array,
    b: jax.Array,
    temperature: jax.Array,
    bias: jax.Array,
    ids: jax.Array,
    valid: jax.Array,
    sums: tuple[jax.Array, ...],
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One device's part of the gradients of `a`, `b`, temperature and bias."""
    unit_a, to_a = jax.vjp(lambda x: unit_length(x.astype(jnp.float32)), a)
    number = jnp.maximum(_sum_over_devices(plan, jnp.sum(valid)), 1)
    row_sums, column_sums = ((sums[0], sums[2]), sums[1]) if sums else ((), ())
    visit = functools.partial(
        _add_gradients, plan.sigmoid, _Side(unit_a, ids, valid), row_sums, temperature, bias
    )
    # Columns that come once need no gradient to add to.
    start = jnp.zeros(b.shape, jnp.float32) if plan.ring else None
    columns = (_Side(b, ids, valid), column_sums, start)
    zero = jnp.zeros((), jnp.float32)
    totals = (jnp.zeros(a.shape, jnp.float32), zero, zero)
    unit_b_grad, (unit_a_grad, cosine_grad, bias_grad) = _meet(
        plan, visit, _merge_gradients, columns, totals
    )
    _, to_b = jax.vjp(lambda x: unit_length(x.astype(jnp.float32)), b)
    factor = gradient / number
    return (
        *to_a(unit_a_grad * (factor / temperature)),
        *to_b(unit_b_grad * (factor / temperature)),
        _sum_over_devices(plan, cosine_grad) * (-factor / temperature**2),
        _sum_over_devices(plan, bias_grad) * factor,
    )


def _add_scores(
    sigmoid: bool,
    rows: _Side,
    temperature: jax.Array,
    bias: jax.Array,
    columns: tuple[_Side, _Sums],
    of_rows: _Sums,
) -> tuple[_Sums, _Sums]:
    """Adds a block of scores to the sums of its columns and of its rows."""
    side, of_columns = columns
    scores, counts, positive = _scores(rows, side)
    scores = scores / temperature
    if sigmoid:
        losses = jax.nn.softplus(jnp.where(positive, -1.0, 1.0) * (scores + bias))
        added = jnp.sum(jnp.where(counts, losses, 0.0), axis=1)
        return of_columns, of_rows._replace(total=of_rows.total + added)
    return tuple(
        _add_to_sums(sums, scores, counts, positive, axis)
        for sums, axis in ((of_columns, 0), (of_rows, 1))
    )


def _add_to_sums(
    sums: _Sums, scores: jax.Array, counts: jax.Array, positive: jax.Array, axis: int
) -> _Sums:
    """Running log-sum-exp and positives over an axis of a block."""
    scores = jnp.where(counts, scores, _NOTHING)
    top = jnp.maximum(sums.top, jnp.max(scores, axis=axis))
    shifted = jnp.exp(scores - jnp.expand_dims(top, axis))
    return _Sums(
        top,
        sums.total * jnp.exp(sums.top - top) + jnp.sum(shifted, axis=axis),
        sums.positive + jnp.sum(jnp.where(positive, scores, 0.0), axis=axis),
        sums.count + jnp.sum(positive, axis=axis),
    )


def _add_gradients(
    sigmoid: bool,
    rows: _Side,
    row_sums: tuple[jax.Array, ...],
    temperature: jax.Array,
    bias: jax.Array,
    columns: tuple[_Side, Any, jax.Array | None],
    totals: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Adds a block to the gradients of its columns, its rows, the cosines' scale and the bias."""
    side, column_log, column_grad = columns
    cosines, counts, positive = _scores(rows, side)
    scores = cosines / temperature
    if sigmoid:
        signs = jnp.where(positive, -1.0, 1.0)
        grads = signs * jax.nn.sigmoid(signs * (scores + bias))
    else:
        row_log, count = row_sums
        scores = jnp.where(counts, scores, _NOTHING)
        grads = (jnp.exp(scores - row_log[:, None]) + jnp.exp(scores - column_log[None, :])) / 2
        grads -= jnp.where(positive, 1.0 / count[:, None], 0.0)
    grads = jnp.where(counts, grads, 0.0)
    row_grad, scale_grad, bias_grad = totals
    unit_columns = unit_length(side.features.astype(jnp.float32))
    totals = (
        row_grad + grads @ unit_columns,
        scale_grad + jnp.sum(grads * cosines),
        bias_grad + jnp.sum(grads),
    )
    added = grads.T @ rows.features
    return added if column_grad is None else column_grad + added, totals


def _scores(rows: _Side, columns: _Side) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cosines of a block, which of them count, and which are positives."""
    counts = rows.valid[:, None] & columns.valid[None, :]
    positive = counts & (rows.ids[:, None] == columns.ids[None, :])
    return rows.features @ unit_length(columns.features.astype(jnp.float32)).T, counts, positive


def _no_sums(rows: int) -> _Sums:
    """Sums before any score."""
    zeros = jnp.zeros(rows, jnp.float32)
    return _Sums(jnp.full(rows, _NOTHING), zeros, zeros, zeros)


def _meet(
    plan: _Plan,
    visit: Callable[[Any, Any], tuple[Any, Any]],
    merge: Callable[[RowLayout, Any], Any],
    columns: tuple[Any, ...],
    totals: Any,
) -> tuple[Any, Any]:
    """Lets a device's rows meet the columns of all devices, block by block.

    Args:
        plan: what is fixed.
        visit: (a block of columns, totals) -> (the block's last part with what was added, totals).
        merge: adds up what all devices found of gathered columns; each gets its own columns'.
        columns: this device's, a `_Side` first; tree of `(R, ...)`. The last part is what the
            visits change, alike on all devices at first.
        totals: of the rows.

    Returns:
        The last part of this device's columns, and the totals.
    """
    axes, shards = plan.layout.axes, plan.layout.shards
    rows = columns[0].ids.shape[0]
    chunk = plan.chunk_size or min(max(_BLOCK // rows, _CHUNKS[0]), _CHUNKS[1])
    if shards == 1:
        return _sweep(visit, columns, totals, chunk)
    if plan.ring:
        hops = [(i, (i + 1) % shards) for i in range(shards)]

        def hop(_: int, carry: Any) -> Any:
            columns, totals = carry
            new, totals = _sweep(visit, columns, totals, chunk)
            columns = jax.tree.map(lambda x: jax.lax.ppermute(x, axes, hops), (*columns[:-1], new))
            return columns, totals

        columns, totals = jax.lax.fori_loop(0, shards, hop, (columns, totals))
        return columns[-1], totals

    def visit_all(block: Any, totals: Any) -> tuple[Any, Any]:
        gathered = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), block[:-1])
        empty = jax.tree.map(lambda x: jnp.tile(x, (shards, *(1,) * (x.ndim - 1))), block[-1])
        found, totals = visit((*gathered, empty), totals)
        return merge(plan.layout, found), totals

    return _sweep(visit_all, columns, totals, max(1, chunk // shards))


def _sweep(
    visit: Callable[[Any, Any], tuple[Any, Any]], columns: Any, totals: Any, chunk: int
) -> tuple[Any, Any]:
    """Visits about `chunk` columns at a time; returns what is new of all, and the totals."""
    number = columns[0].ids.shape[0]
    blocks = -(-number // chunk)
    if blocks == 1:
        return visit(columns, totals)
    chunk = -(-number // blocks)
    padding = blocks * chunk - number  # zeros: columns that do not count

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) if padding else x
        return x.reshape(blocks, chunk, *x.shape[1:])

    def step(totals: Any, block: Any) -> tuple[Any, Any]:
        new, totals = visit(block, totals)
        return totals, new

    totals, new = jax.lax.scan(step, totals, jax.tree.map(split, columns))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:number], new), totals


def _merge_sums(layout: RowLayout, sums: _Sums) -> _Sums:
    """Sums of all columns `(N,)`, of each device's rows, as those of this device's columns."""
    top = jax.lax.pmax(sums.top, layout.axes)
    total = sums.total * jnp.exp(sums.top - top)
    rows = sums.top.shape[0] // layout.shards
    start = jax.lax.axis_index(layout.axes) * rows
    return _Sums(
        jax.lax.dynamic_slice_in_dim(top, start, rows),
        *(_merge_gradients(layout, x) for x in (total, sums.positive, sums.count)),
    )


def _merge_gradients(layout: RowLayout, x: jax.Array) -> jax.Array:
    """Sum over devices of `(N, ...)`, this device's part."""
    return jax.lax.psum_scatter(x, layout.axes, scatter_dimension=0, tiled=True)


def _sum_over_devices(plan: _Plan, x: jax.Array) -> jax.Array:
    """Sum over the devices that hold other rows."""
    return jax.lax.psum(x, plan.layout.axes) if plan.layout.axes else x
