"""Next-token cross entropy of language models (spec stage3 5.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
    batch = logits.shape[0]
    if batch % groups:
        raise ValueError(f"a batch of {batch} does not split into groups={groups}")
    logits, targets = logits[:, :-1].astype(jnp.float32), targets[:, 1:]
    wanted = targets >= 0
    index = jnp.where(wanted, targets, 0)[..., None]
    # An id outside the vocabulary gives NaN, never another token's score.
    scores = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    losses = jnp.where(wanted, jax.nn.logsumexp(logits, axis=-1) - scores, 0.0)
    count = wanted.reshape(groups, -1).sum(axis=1)
    means = losses.reshape(groups, -1).sum(axis=1) / jnp.maximum(count, 1)
    hits = (jnp.argmax(logits, axis=-1) == targets) & wanted
    metrics = {"targets": count.sum(), "accuracy": hits.sum() / jnp.maximum(count.sum(), 1)}
    return means.mean(), metrics
