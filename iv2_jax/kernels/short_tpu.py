"""Attention over short sequences on TPU: whole heads of one clip in on-chip memory at a time.

A masked clip has a few hundred tokens, of a number that is no multiple of anything (206, 417), in
heads whose size need not be one either (88). One step of this Pallas kernel takes all tokens of one
clip and a group of its heads as they lie in memory, `(B, N, heads x head size)`: nothing is padded,
nothing is transposed, and scores and weights never leave the chip. A whole row of scores is at
hand, so the backward pass computes maxima and sums again and needs nothing but what the forward
pass was given: eleven arrays are read or written in all, four forward and seven backward.

Where such a group would not fit the chip's memory, heads are brought to the front in HBM and a
group can be smaller (`short_plan.py`). Softmax is float32, as are sums of products; float32 inputs
are multiplied in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from iv2_jax.kernels import short_plan
from iv2_jax.kernels.choice import device_kind
from iv2_jax.kernels.mesh import on_each_device
from iv2_jax.kernels.short_kernel import Case, backward, forward, tiles

# Names of the kernels, in profiles and plans.
FORWARD, BACKWARD = "short_attention_forward", "short_attention_backward"


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None,
    scale: float,
    causal: bool,
    segments: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention by the kernel of this file; differentiable.

    Under a mesh set with `jax.set_mesh` it runs in a `shard_map` (`kernels/mesh.py`).

    Args:
        q: `(B, N, h, d)`, N up to `short_plan.MAX_LENGTH`, float32 or bfloat16.
        k: `(B, M, g, d)`, M up to the same, g dividing h.
        v: `(B, M, g, d)`.
        mask: bool `(B or 1, 1, 1, M)`, True = attend; the same for all queries and heads.
        scale: factor of the scores.
        causal: hide later keys (N == M).
        segments: int `(B, N)`, N == M, from 0 on: those of another number are hidden; None for
            one.
        interpret: run the kernel step by step in XLA, on any platform (tests).

    Returns:
        `(B, N, h, d)` in the dtype of `v`; zeros for a query all of whose keys are hidden.

    Raises:
        ValueError: a step does not fit the chip's memory; `choice.py` asks before.
    """
    batch, keys, groups, _ = k.shape
    ids = []
    if mask is not None or segments is not None:
        own = jnp.zeros((batch, keys), jnp.int32) if segments is None else segments
        visible = True if mask is None else jnp.broadcast_to(mask[:, 0, 0], (batch, keys))
        ids = [jnp.where(visible, own, -1).astype(jnp.int32)]
        ids += [] if segments is None else [segments.astype(jnp.int32)]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *ids: jax.Array) -> jax.Array:
        return _attend_local(q, k, v, ids, scale, causal, interpret)

    return on_each_device(local, batch, groups)((q, k, v), tuple(ids))


def _attend_local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: Sequence[jax.Array],
    scale: float,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """The rows and heads of one device."""
    (_, queries, heads, head_dim), (_, keys, groups, _) = q.shape, k.shape
    dtype = jnp.result_type(q, k, v)
    vmem = short_plan.vmem_bytes(device_kind(), interpret)
    shape = (queries, keys, heads, groups, head_dim)
    steps = short_plan.plan(*shape, itemsize=dtype.itemsize, causal=causal, vmem=vmem)
    if steps is None:
        raise ValueError(
            f"attention of {queries} queries and {keys} keys in heads of {head_dim} does not fit "
            f"{vmem >> 20} MiB of on-chip memory; use another backend"
        )

    def laid_out(x: jax.Array) -> jax.Array:
        x = x.astype(dtype)
        return x.reshape(*x.shape[:2], -1) if steps.folded else x.swapaxes(1, 2)

    case = Case(steps, queries, keys, heads, groups, head_dim, scale, causal, interpret)
    out = _attend(case, laid_out(q), laid_out(k), laid_out(v), tuple(i[:, None] for i in ids))
    out = out.reshape(q.shape) if steps.folded else out.swapaxes(1, 2)
    return out.astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    case: Case, q: jax.Array, k: jax.Array, v: jax.Array, ids: tuple[jax.Array, ...]
) -> jax.Array:
    """Attention of arrays that are laid out; `ids` int32 (B, 1, M), (B, 1, N), or fewer."""
    return _call(forward, case, (q, k, v), ids, (q,), products=2)[0]


def _attend_forward(
    case: Case, q: jax.Array, k: jax.Array, v: jax.Array, ids: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[Any, ...]]:
    """Keeps what the forward pass was given, and nothing it computed."""
    return _attend(case, q, k, v, ids), (q, k, v, ids)


def _attend_backward(
    case: Case, kept: tuple[Any, ...], grad: jax.Array
) -> tuple[jax.Array | None, ...]:
    """Gradients of queries, keys and values; numbers have none."""
    q, k, v, ids = kept
    return *_call(backward, case, (q, k, v, grad), ids, (q, k, v), products=5), None


_attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kernel: Callable[..., None],
    case: Case,
    arrays: Sequence[jax.Array],
    ids: Sequence[jax.Array],
    results: Sequence[jax.Array],
    products: int,
) -> list[jax.Array]:
    """Runs a kernel over clips and groups of heads.

    Args:
        kernel: `forward` or `backward`.
        case: what it is compiled for.
        arrays: queries, keys, values and perhaps the output's gradient, laid out.
        ids: int32 `(B, 1, length)`, those of keys first.
        results: arrays that its results are like: queries and perhaps keys and values.
        products: matrix products of a tile of scores, for the estimate of costs.
    """
    steps = case.steps

    def blocks(arrays: Sequence[jax.Array]) -> list[pl.BlockSpec]:
        """Of queries, keys, values and one more array like the queries."""
        counts = (steps.heads, steps.groups, steps.groups, steps.heads)
        return [_block(case, x, count) for x, count in zip(arrays, counts, strict=False)]

    scores = arrays[0].shape[0] * case.heads * sum(t.rows * t.seen for t in tiles(case))
    moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *ids, *results))
    is_backward = len(results) > 1
    stages = [pltpu.VMEM((x.shape[1], case.head_dim), x.dtype) for x in (*arrays, *results)]
    sums = [pltpu.VMEM((case.keys, case.head_dim), jnp.float32)] * 2
    return pl.pallas_call(
        functools.partial(kernel, case, len(ids)),
        grid=(arrays[0].shape[0], case.groups // steps.groups),
        in_specs=[
            *blocks(arrays),
            *(pl.BlockSpec((1, 1, x.shape[2]), lambda b, g: (b, 0, 0)) for x in ids),
        ],
        out_specs=blocks(results),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        scratch_shapes=stages * case.is_staged + sums * (is_backward and case.adds_up),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=steps.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * case.head_dim,
            transcendentals=scores,
            bytes_accessed=moved,
        ),
        interpret=case.interpret,
        name=BACKWARD if is_backward else FORWARD,
    )(*arrays, *ids)


def _block(case: Case, x: jax.Array, heads: int) -> pl.BlockSpec:
    """All tokens of one clip in some of the heads."""
    mode = pl.Buffered(case.steps.buffers)
    if case.steps.folded:
        shape = (1, x.shape[1], heads * case.head_dim)
        return pl.BlockSpec(shape, lambda b, g: (b, 0, g), pipeline_mode=mode)
    return pl.BlockSpec((1, heads, *x.shape[2:]), lambda b, g: (b, g, 0, 0), pipeline_mode=mode)
