"""Masked language modelling: corrupting token ids, and the loss over what was hidden.

Source: spec stage2 6.3. Bidirectional, as the released code has it (the paper writes a causal
formula).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from iv2_jax.errors import ConfigError
from iv2_jax.objectives.layout import row_layout

LogitsFn = Callable[[jax.Array], jax.Array]  # (..., D) -> (..., V)
_Both = Callable[..., tuple[jax.Array, jax.Array]]  # few places, all, *parameters -> logits

IGNORED = -100  # label of a place that the loss leaves out
PROBABILITY = 0.5

_AS_MASK, _AS_RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay as they are


def corrupt(
    rng: jax.Array,
    ids: jax.Array,
    *,
    vocab_size: int,
    mask_id: int,
    special_ids: tuple[int, ...],
    probability: float = PROBABILITY,
) -> tuple[jax.Array, jax.Array]:
    """Hides tokens of a text.

    Of the chosen tokens four fifths become the mask token, a tenth any token of the vocabulary
    (specials among them, as in the original), and a tenth stay.

    Args:
        rng: key.
        ids: int `(B, L)` token ids.
        vocab_size: number of ids; 30522 for BERT.
        mask_id: id of the mask token; 103 for BERT.
        special_ids: ids that are never chosen: padding and the class token, 0 and 101 for BERT.
        probability: of choosing a token.

    Returns:
        Corrupted ids and labels, both `(B, L)` in the dtype of `ids`; labels are the true ids of
        chosen tokens and -100 elsewhere.
    """
    choose_rng, kind_rng, word_rng = jax.random.split(rng, 3)
    may = jnp.ones(ids.shape, bool)
    for special in special_ids:
        may &= ids != special
    chosen = jax.random.bernoulli(choose_rng, probability, ids.shape) & may
    kind = jax.random.uniform(kind_rng, ids.shape)
    words = jax.random.randint(word_rng, ids.shape, 0, vocab_size, ids.dtype)
    hidden = jnp.where(kind < _AS_MASK, jnp.asarray(mask_id, ids.dtype), ids)
    replaced = (kind >= _AS_MASK) & (kind < _AS_MASK + _AS_RANDOM)
    hidden = jnp.where(replaced, words, hidden)
    return jnp.where(chosen, hidden, ids), jnp.where(chosen, ids, IGNORED)


def masked_lm_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy over the places that have a label.

    Args:
        logits: `(B, L, V)`.
        labels: int `(B, L)`, -100 where there is none.

    Returns:
        float32 scalar; 0 where no place has a label (the original gives NaN).
    """
    total, count = masked_lm_sums(logits, labels)
    return total / jnp.maximum(count, 1.0)


def masked_lm_sums(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross entropies, and their number, both float32.

    For shards with different numbers of hidden tokens: summed over shards before the division they
    give the mean over all tokens, while the original averages the devices' means.
    """
    labelled = labels != IGNORED
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.where(labelled, labels, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(labelled, losses, 0.0)), jnp.sum(labelled).astype(jnp.float32)


def masked_positions(labels: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Places that have a label, as many as a fixed capacity holds.

    Args:
        labels: int `(..., P)`, -100 where there is none.
        capacity: number of places K to give.

    Returns:
        int32 `(..., K)` the first K labelled places of the last axis, ascending, then P for what
        is left (out of range: give `jnp.take` a `mode`); and bool `(...)`, whether these are all.
    """
    labelled = labels != IGNORED
    rank = jnp.cumsum(labelled, axis=-1)
    wanted = jnp.arange(1, capacity + 1)
    # The k-th labelled place is the first one whose rank is k.
    find = functools.partial(jnp.searchsorted, side="left")
    flat = jax.vmap(find, in_axes=(0, None))(rank.reshape(-1, rank.shape[-1]), wanted)
    index = flat.reshape(*labels.shape[:-1], capacity).astype(jnp.int32)
    return index, rank[..., -1] <= capacity


def masked_lm_loss_of(
    hidden: jax.Array, labels: jax.Array, logits_fn: LogitsFn, capacity: int
) -> jax.Array:
    """`masked_lm_loss(logits_fn(hidden), labels)`, with logits of hidden words only.

    Most places of a text have no label, and logits over a vocabulary are much of a small model's
    work. Where more places than `capacity` have one, all are computed (`lax.cond`), so the value
    is that of the plain loss in any case. The gradient is computed along with the value, while
    the logits are there; a second derivative is not offered.

    On a mesh each device takes its share of the capacity for its own rows, and nothing but sums
    crosses devices.

    Args:
        hidden: `(B, L, D)` what the logits are of.
        labels: int `(B, L)`, -100 where there is none.
        logits_fn: `(..., D)` to `(..., V)`, place by place, without randomness. It may be a method
            of a bound Linen module, or close over parameters; gradients flow to both.
        capacity: places in the whole batch, a fixed number such as 1.2 times the expected one; as
            many as there are, or more, computes the plain loss.

    Returns:
        float32 scalar; 0 where no place has a label.

    Raises:
        ConfigError: `capacity` is below one.
    """
    if capacity < 1:
        raise ConfigError(f"capacity={capacity}: give the places to compute logits of, at least 1")
    if capacity >= labels.size:
        return masked_lm_loss(logits_fn(hidden), labels)
    shards = row_layout(labels.shape[0]).shards
    width = labels.size // shards
    rows = hidden.reshape(shards, width, hidden.shape[-1])
    labels = labels.reshape(shards, width)
    capacity = min(-(-capacity // shards), width)
    few = jax.ShapeDtypeStruct((shards, capacity, rows.shape[-1]), rows.dtype)
    both, parameters = _closed(logits_fn, few, rows)
    return _loss_of(both, capacity, rows, parameters, labels)


def _closed(
    logits_fn: LogitsFn, few: jax.ShapeDtypeStruct, full: jax.Array
) -> tuple[_Both, list[jax.Array]]:
    """The logits of few and of all places as a function of these and of the parameters.

    One function for both shapes, so that both know the same parameters in the same order; what is
    not asked of it is not compiled.
    """
    module = getattr(logits_fn, "__self__", None)
    if isinstance(module, nn.Module):
        # A bound module cannot be called inside a branch, another copy of it can.
        module, variables = module.unbind()
        name = logits_fn.__name__

        def logits_fn(x: jax.Array) -> jax.Array:
            return module.apply(variables, x, method=name)

    return jax.closure_convert(lambda x, y: (logits_fn(x), logits_fn(y)), few, full)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_of(
    both: _Both, capacity: int, hidden: jax.Array, parameters: list[jax.Array], labels: jax.Array
) -> jax.Array:
    """The loss of `(S, P, D)` hidden states in S parts."""
    return _choose(lambda loss, *args: loss(*args), both, capacity, hidden, parameters, labels)


def _loss_and_gradients(
    both: _Both, capacity: int, hidden: jax.Array, parameters: list[jax.Array], labels: jax.Array
) -> tuple[jax.Array, Any]:
    """The loss, and its gradients for a gradient of one."""

    def compute(loss: Callable[..., jax.Array], *args: Any) -> Any:
        return jax.value_and_grad(loss, argnums=(0, 1))(*args)

    return _choose(compute, both, capacity, hidden, parameters, labels)


def _scale_gradients(both: _Both, capacity: int, kept: Any, gradient: jax.Array) -> Any:
    """The gradients times that of the loss."""
    hidden, parameters = jax.tree.map(lambda x: (x * gradient).astype(x.dtype), kept)
    return hidden, parameters, None


_loss_of.defvjp(_loss_and_gradients, _scale_gradients)


def _choose(
    compute: Callable[..., Any],
    both: _Both,
    capacity: int,
    hidden: jax.Array,
    parameters: list[jax.Array],
    labels: jax.Array,
) -> Any:
    """`compute(loss, hidden, parameters)` of the labelled places if they fit, of all if not.

    What it gives is the loss, or that and gradients of hidden states and parameters; the first of
    them are brought back to their places.
    """
    index, fits = masked_positions(labels, capacity)

    def full() -> Any:
        def loss(hidden: jax.Array, parameters: list[jax.Array]) -> jax.Array:
            unused = jnp.zeros_like(hidden[:, :capacity])
            return masked_lm_loss(both(unused, hidden, *parameters)[1], labels)

        return compute(loss, hidden, parameters)

    def few() -> Any:
        def loss(picked: jax.Array, parameters: list[jax.Array]) -> jax.Array:
            unused = jnp.zeros_like(hidden)
            return masked_lm_loss(both(picked, unused, *parameters)[0], picked_labels)

        picked_labels = jax.vmap(lambda x, i: jnp.take(x, i, mode="fill", fill_value=IGNORED))(
            labels, index
        )
        take = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="fill", fill_value=0))
        result = compute(loss, take(hidden, index), parameters)
        if not isinstance(result, tuple):
            return result
        value, (grads, of_parameters) = result
        put = jax.vmap(lambda zeros, i, x: zeros.at[i].set(x, mode="drop"))
        return value, (put(jnp.zeros_like(hidden), index, grads), of_parameters)

    return jax.lax.cond(jnp.all(fits), few, full)
