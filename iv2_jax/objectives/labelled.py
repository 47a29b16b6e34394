"""Cross entropy of places that have a label, with logits of those places only.

Logits over a vocabulary are much of a small model's work and, over long rows, most of any model's
memory. Here they are computed a fixed number of labelled places at a time, as many times as a batch
needs, and the gradient along with the value, while the logits are there: they are never computed
twice and never stored.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from iv2_jax.errors import ConfigError
from iv2_jax.objectives.layout import row_layout

# (parameters, hidden (..., D), number of the round, extra) -> logits (..., V), place by place.
LogitsFn = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]

IGNORED = -100  # any negative label leaves its place out


class Labelled(NamedTuple):
    """What `labelled_loss` gives, both float32 scalars.

    Attributes:
        loss: sum over labelled places of weight times cross entropy.
        hits: sum of weights where the logits rank the label first.
    """

    loss: jax.Array
    hits: jax.Array


def labelled_loss(
    logits_fn: LogitsFn,
    parameters: Any,
    hidden: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *,
    capacity: int,
    extra: Any = None,
    smoothing: float = 0.0,
) -> Labelled:
    """Weighted cross entropy of the labelled places of a batch.

    On a mesh each device takes its share of the capacity for its own rows, and nothing but sums and
    the logits' own products crosses devices. Gradients flow to `hidden` and to those `parameters`
    that are differentiated; a second derivative is not offered.

    Args:
        logits_fn: (parameters, hidden states `(S, K, D)`, round, extra) to logits `(S, K, V)`.
            Pure, closing over no traced value; the round tells one draw of dropout from the next.
        parameters: what it needs, any tree of arrays.
        hidden: `(B, L, D)` what the logits are of.
        labels: int `(B, L)`, negative where there is none.
        weights: float32 `(B,)`, of each row's places; no gradient flows to them.
        capacity: places of the whole batch whose logits are in memory at once.
        extra: further arrays for `logits_fn`, such as a key; no gradient flows to them.
        smoothing: share of the target that all ids of the vocabulary have equally.

    Returns:
        `Labelled`. A label outside the vocabulary gives NaN.

    Raises:
        ConfigError: `capacity` is below one.
    """
    if capacity < 1:
        raise ConfigError(f"capacity={capacity}: give the places to compute logits of, at least 1")
    shards = row_layout(labels.shape[0]).shards
    width = labels.size // shards
    weights = jnp.broadcast_to(weights.astype(jnp.float32)[:, None], labels.shape)
    loss, hits = _loss_of(
        logits_fn,
        min(-(-capacity // shards), width),
        smoothing,
        parameters,
        hidden.reshape(shards, width, hidden.shape[-1]),
        labels.reshape(shards, width),
        weights.reshape(shards, width),
        extra,
    )
    return Labelled(loss, hits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss_of(
    logits_fn: LogitsFn,
    capacity: int,
    smoothing: float,
    parameters: Any,
    hidden: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    extra: Any,
) -> tuple[jax.Array, jax.Array]:
    """The sums, of `(S, P, D)` hidden states in S parts; no gradient is asked for."""

    def one_round(sums: Any, at: _Round) -> Any:
        own = _sums_of(logits_fn, parameters, _take(hidden, at.index), at, extra, smoothing)
        return jax.tree.map(jnp.add, sums, own)

    return _rounds(one_round, (jnp.float32(0), jnp.float32(0)), capacity, labels, weights)


def _with_gradients(
    logits_fn: LogitsFn,
    capacity: int,
    smoothing: float,
    parameters: Any,
    hidden: Any,
    labels: Any,
    weights: Any,
    extra: Any,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """The sums, and the gradients of the loss for what is differentiated."""
    leaves, tree = jax.tree.flatten(parameters)
    asked = [leaf.perturbed for leaf in leaves]
    values = [leaf.value for leaf in leaves]
    wanted = [value for value, on in zip(values, asked, strict=True) if on]
    rows, extra = hidden.value, jax.tree.map(lambda leaf: leaf.value, extra)

    def loss(wanted: list[jax.Array], picked: jax.Array, at: _Round) -> tuple[Any, Any]:
        given = iter(wanted)
        merged = [next(given) if on else v for v, on in zip(values, asked, strict=True)]
        own = _sums_of(logits_fn, jax.tree.unflatten(tree, merged), picked, at, extra, smoothing)
        return own[0], own

    def one_round(carry: Any, at: _Round) -> Any:
        sums, grads, of_rows = carry
        compute = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, own), (more, of_picked) = compute(wanted, _take(rows, at.index), at)
        put = jax.vmap(lambda whole, i, x: whole.at[i].set(x, mode="drop"))
        sums, grads = jax.tree.map(jnp.add, (sums, grads), (own, more))
        return sums, grads, put(of_rows, at.index, of_picked)

    start = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, wanted)
    start = (*start, jnp.zeros_like(rows))
    sums, grads, of_rows = _rounds(one_round, start, capacity, labels.value, weights.value)
    given = iter(grads)
    # Those that nobody differentiates have no gradient, and none is kept for them.
    of_parameters = [next(given) if on else None for on in asked]
    return sums, (jax.tree.unflatten(tree, of_parameters), of_rows)


def _scale_gradients(
    logits_fn: LogitsFn, capacity: int, smoothing: float, kept: Any, gradients: Any
) -> Any:
    """The gradients times that of the loss."""
    del logits_fn, capacity, smoothing
    of_loss = gradients[0]
    if isinstance(of_loss, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    parameters, hidden = jax.tree.map(lambda x: (x * of_loss).astype(x.dtype), kept)
    return parameters, hidden, None, None, None


_loss_of.defvjp(_with_gradients, _scale_gradients, symbolic_zeros=True)


class _Round(NamedTuple):
    """Labelled places of one round: K in each of the S parts, filled up with places out of range.

    Attributes:
        number: of the round, from 0 on.
        index: int32 `(S, K)`.
        labels: int `(S, K)`, `IGNORED` for what fills up.
        weights: float32 `(S, K)`.
    """

    number: jax.Array
    index: jax.Array
    labels: jax.Array
    weights: jax.Array


def _rounds(
    one_round: Callable[[Any, _Round], Any],
    start: Any,
    capacity: int,
    labels: jax.Array,
    weights: jax.Array,
) -> Any:
    """Goes through the labelled places, `capacity` of each part at a time."""
    rank = jnp.cumsum(labels >= 0, axis=-1)
    most = jnp.max(rank[:, -1])
    last = -(-labels.shape[-1] // capacity)

    def more(carry: tuple[jax.Array, Any]) -> jax.Array:
        # The second condition ends no loop; it tells whoever plans memory and time the most turns.
        return (carry[0] * capacity < most) & (carry[0] < last)

    def go_on(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        number, rest = carry
        # The k-th labelled place is the first one whose rank is k.
        asked = number * capacity + jnp.arange(1, capacity + 1)
        index = jax.vmap(functools.partial(jnp.searchsorted, side="left"), (0, None))(rank, asked)
        index = index.astype(jnp.int32)
        take = jax.vmap(
            lambda x, i, fill: jnp.take(x, i, mode="fill", fill_value=fill), (0, 0, None)
        )
        at = _Round(number, index, take(labels, index, IGNORED), take(weights, index, 0))
        return number + 1, one_round(rest, at)

    return jax.lax.while_loop(more, go_on, (jnp.int32(0), start))[1]


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """`(S, K, D)` of `(S, P, D)`; zeros out of range."""
    return jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="fill", fill_value=0))(rows, index)


def _sums_of(
    logits_fn: LogitsFn,
    parameters: Any,
    picked: jax.Array,
    at: _Round,
    extra: Any,
    smoothing: float,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of losses and hits of a round's places `(S, K, D)`."""
    logits = logits_fn(parameters, picked, at.number, extra).astype(jnp.float32)
    wanted = at.labels >= 0
    index = jnp.where(wanted, at.labels, 0)[..., None]
    # An id outside the vocabulary gives NaN, never another token's score.
    scores = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    target = scores
    if smoothing:
        target = (1 - smoothing) * scores + smoothing * jnp.mean(logits, axis=-1)
    losses = jnp.where(wanted, jax.nn.logsumexp(logits, axis=-1) - target, 0.0)
    hits = wanted & (jnp.argmax(logits, axis=-1) == at.labels)
    return jnp.sum(at.weights * losses), jnp.sum(at.weights * hits)
