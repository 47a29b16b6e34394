"""Next-token cross entropy of language models (spec stage3 5.1)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from iv2_jax.objectives.labelled import IGNORED, LogitsFn, labelled_loss


def next_token_loss(
    logits: jax.Array, targets: jax.Array, *, groups: int = 1
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross entropy of the targets, each scored by the logits of the position before it.

    Args:
        logits: `(B, L, V)`; row i scores the token at i + 1.
        targets: int `(B, L)`, the tokens themselves, not shifted; negative ones (`data.dialogue`'s
            `IGNORE`) are left out.
        groups: 1 gives every target of the batch the same weight. The original takes the mean of
            each device's batch and averages these: to get its loss give the number of its devices
            times its accumulation steps; each group of B / groups neighbouring rows weighs the
            same (spec stage3 5.1, trap 32).

    Returns:
        The loss, float32, 0 where there is nothing to learn from; and metrics: `targets`, how
        many there are, and `accuracy`, the share of them that the logits rank first.

    Raises:
        ValueError: B is no multiple of `groups`.
    """
    weights = target_weights(targets, groups=groups)
    logits, targets = logits[:, :-1].astype(jnp.float32), targets[:, 1:]
    wanted = targets >= 0
    index = jnp.where(wanted, targets, 0)[..., None]
    # An id outside the vocabulary gives NaN, never another token's score.
    scores = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    losses = jnp.where(wanted, jax.nn.logsumexp(logits, axis=-1) - scores, 0.0)
    count = wanted.sum()
    hits = (jnp.argmax(logits, axis=-1) == targets) & wanted
    metrics = {"targets": count, "accuracy": hits.sum() / jnp.maximum(count, 1)}
    return jnp.sum(weights[:, None] * losses), metrics


def target_weights(targets: jax.Array, *, groups: int = 1) -> jax.Array:
    """What each target of a row weighs in the loss: float32 `(B,)`, so that all give a mean.

    Taken of the whole batch before it is split, the sum of the parts' losses is the batch's loss.

    Args:
        targets: int `(B, L)`, not shifted.
        groups: as in `next_token_loss`.

    Raises:
        ValueError: B is no multiple of `groups`.
    """
    batch = targets.shape[0]
    if batch % groups:
        raise ValueError(f"a batch of {batch} does not split into groups={groups}")
    count = jnp.sum(targets[:, 1:] >= 0, axis=1).reshape(groups, -1).sum(axis=1)
    each = 1 / (groups * jnp.maximum(count, 1).astype(jnp.float32))
    return jnp.repeat(each, batch // groups)


def next_token_loss_of(
    logits_fn: LogitsFn,
    parameters: Any,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    capacity: int,
    extra: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`next_token_loss` with logits of the positions before targets only.

    Args:
        logits_fn: the head, see `labelled.labelled_loss`.
        parameters: the head's.
        hidden: `(B, L, D)` what the head reads.
        targets: int `(B, L)`, not shifted; negative ones are left out.
        weights: `target_weights` of the rows.
        capacity: positions whose logits are in memory at once; any number gives the same loss.
        extra: further arrays for `logits_fn`.

    Returns:
        The loss, and the sum of the weights of the targets that the logits rank first: with one
        group, their share. Both float32.
    """
    # A row's last position scores nothing.
    labels = jnp.pad(targets[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    found = labelled_loss(
        logits_fn, parameters, hidden, labels, weights, capacity=capacity, extra=extra
    )
    return found.loss, found.hits
