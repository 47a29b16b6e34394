"""Matching of media and text with hard negatives (spec stage2 6.2).

Drawing the negatives is apart from using them: the loss is a pure function of given indices.
Negatives are drawn among the rows that the functions are given. The original mines each device's
own batch (64 rows), and mining in a larger one is a harder task: in a `shard_map` over the data
axis these functions see one shard's rows, and the mean of `matching_loss` over shards is the loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def negative_weights(
    scores: jax.Array, ids: jax.Array, other_ids: jax.Array | None = None
) -> jax.Array:
    """How likely each column is drawn as a row's negative: the more alike, the likelier.

    Args:
        scores: `(M, N)` similarities over the temperature, of rows with columns. No gradient flows
            through.
        ids: int `(M,)` ids of the rows.
        other_ids: int `(N,)` ids of the columns; None for `ids`.

    Returns:
        `(M, N)` float32, zero where the ids are equal. Rows need not sum to one; a row of zeros
        has no negative. What is not finite counts as 0.01, as in the original.
    """
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    weights = jax.nn.softmax(scores, axis=1)
    other_ids = ids if other_ids is None else other_ids
    weights = jnp.where(ids[:, None] == other_ids[None, :], 0.0, weights)
    return jnp.where(jnp.isfinite(weights), weights, 0.01)


def uniform_weights(ids: jax.Array, other_ids: jax.Array | None = None) -> jax.Array:
    """Equal weights for all columns of another id, the original's `vtm_hard_neg=False`.

    Args:
        ids: int `(M,)` ids of the rows.
        other_ids: int `(N,)` ids of the columns; None for `ids`.

    Returns:
        `(M, N)` float32 of zeros and ones.
    """
    other_ids = ids if other_ids is None else other_ids
    return (ids[:, None] != other_ids[None, :]).astype(jnp.float32)


def draw_negatives(rng: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws one column for each row, with probabilities proportional to the weights.

    Args:
        rng: key.
        weights: `(M, N)` non-negative.

    Returns:
        int32 `(M,)` columns, and bool `(M,)`: False where all weights of a row are zero, as in a
        batch of one. The original fails there; here the row's column means nothing, and
        `matching_loss` leaves its pair out.
    """
    columns = jax.random.categorical(rng, jnp.log(weights), axis=1)
    return columns.astype(jnp.int32), jnp.any(weights > 0, axis=1)


def matching_batch(
    media: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    media_negative: jax.Array,
    text_negative: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Puts together what the fusion layers judge: pairs, then two kinds of wrong pairs.

    Args:
        media: `(B, N, C)` video or audio tokens.
        text: `(B, L, D)` hidden states after the text layers.
        text_mask: `(B, L)`.
        media_negative: int `(B,)`, the media to set against each text.
        text_negative: int `(B,)`, the text to set against each media.

    Returns:
        Media `(3B, N, C)`, text `(3B, L, D)` and its mask `(3B, L)`: B true pairs, B texts with
        wrong media, B media with wrong texts.
    """
    return (
        jnp.concatenate([media, jnp.take(media, media_negative, axis=0), media]),
        jnp.concatenate([text, text, jnp.take(text, text_negative, axis=0)]),
        jnp.concatenate([text_mask, text_mask, jnp.take(text_mask, text_negative, axis=0)]),
    )


def matching_loss(
    logits: jax.Array,
    has_media_negative: jax.Array | None = None,
    has_text_negative: jax.Array | None = None,
) -> jax.Array:
    """Mean cross entropy of telling true pairs from wrong ones.

    Args:
        logits: `(3B, 2)` in the order of `matching_batch`; class 1 = they belong together.
        has_media_negative: bool `(B,)` from `draw_negatives`, None for all.
        has_text_negative: bool `(B,)`, likewise.

    Returns:
        float32 scalar, over the pairs that there are.
    """
    batch = logits.shape[0] // 3
    log_shares = jax.nn.log_softmax(logits.astype(jnp.float32), axis=1)
    losses = -jnp.concatenate([log_shares[:batch, 1], log_shares[batch:, 0]])
    everywhere = jnp.ones(batch, bool)
    counts = [
        everywhere if given is None else given
        for given in (None, has_media_negative, has_text_negative)
    ]
    weights = jnp.concatenate(counts).astype(jnp.float32)
    return jnp.sum(losses * weights) / jnp.sum(weights)
