"""Matching of media and text with hard negatives (spec stage2 6.2).

Drawing the negatives is apart from using them: the loss is a pure function of given indices.
Negatives are drawn inside groups of consecutive rows. The original mines each device's own batch
(64 rows); mining in a larger group is a harder task. Groups are a matter of the batch, not of the
devices, so the draws do not depend on how many devices there are; and as long as every group lies
on one device, neither mining nor gathering moves a token between devices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from iv2_jax.errors import ConfigError
from iv2_jax.objectives.contrastive import similarity


class Negatives(NamedTuple):
    """A wrong partner for each row.

    Attributes:
        index: int32 `(B,)` place of the partner within the row's group.
        found: bool `(B,)`, False where the group has none; `index` then means nothing.
    """

    index: jax.Array
    found: jax.Array


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


def mine_negatives(
    rng: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    temperature: jax.Array | float,
    ids: jax.Array,
    *,
    valid: jax.Array | None = None,
    group_size: int = 0,
    hard: bool = True,
    frames: str = "mean",
    floor: float = 0.0,
) -> Negatives:
    """Draws a wrong partner for each row from the columns of its group.

    Args:
        rng: key.
        rows: `(B, C)` features of what gets a partner, before unit length; `(B, L, C)` with one
            for each frame. No gradient flows through.
        columns: `(B, C)` features of the possible partners, likewise.
        temperature: what similarities are divided by.
        ids: int `(B,)`; rows of equal id are never each other's negatives.
        valid: bool `(B,)`, rows that count; others neither get a partner nor are one. None: all.
        group_size: rows of a group, 64 for the original; 0 for the whole batch.
        hard: draw the likelier the more alike; False for `uniform_weights`.
        frames: see `contrastive.similarity`.
        floor: added to every partner's share of the softmax, which then has the true pair in it,
            too: 1e-4 in the Q-Former's pretraining (spec stage3 8.3). 0 leaves the true pair out.

    Returns:
        `Negatives`, the same on any number of devices.

    Raises:
        ConfigError: B does not divide into groups.
    """
    groups, size = _group_shape(rows.shape[0], group_size)
    valid = jnp.ones(ids.shape, bool) if valid is None else valid
    # Rows that do not count may hold anything, even what is not finite.
    rows, columns = (_blank(jax.lax.stop_gradient(x), valid) for x in (rows, columns))
    rows, columns, ids, valid = (
        x.reshape(groups, size, *x.shape[1:]) for x in (rows, columns, ids, valid)
    )
    allowed = (ids[:, :, None] != ids[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    if hard:
        scores = jax.vmap(lambda a, b: similarity(a, b, temperature, frames))(rows, columns)
        # Out before the softmax already: at a low temperature the true pair would take it all,
        # unless a floor leaves something to the others.
        scores = jnp.where(valid[:, None, :] if floor else allowed, scores, -jnp.inf)
        weights = jnp.where(allowed, jax.vmap(negative_weights)(scores, ids) + floor, 0.0)
    else:
        weights = allowed.astype(jnp.float32)
    index = jax.random.categorical(rng, jnp.log(weights), axis=2).astype(jnp.int32)
    return Negatives(index.reshape(-1), jnp.any(weights > 0, axis=2).reshape(-1))


def take_in_groups(x: jax.Array, index: jax.Array, group_size: int = 0) -> jax.Array:
    """Picks for each row another row of its group.

    Args:
        x: `(B, ...)`.
        index: int `(B,)` places within the groups, such as `Negatives.index`.
        group_size: rows of a group; 0 for the whole batch.

    Returns:
        `(B, ...)`.

    Raises:
        ConfigError: B does not divide into groups.
    """
    groups, size = _group_shape(x.shape[0], group_size)
    grouped = x.reshape(groups, size, *x.shape[1:])
    # vmap, so that groups are a batch dimension of the gather, which the partitioner can split.
    picked = jax.vmap(lambda rows, places: jnp.take(rows, places, axis=0))(
        grouped, index.reshape(groups, size)
    )
    return picked.reshape(x.shape)


def _group_shape(rows: int, group_size: int) -> tuple[int, int]:
    """Number and size of the groups."""
    if group_size < 0:
        raise ConfigError(f"group_size={group_size}: give the rows of a group, 0 for all")
    size = group_size or rows
    if rows % size:
        raise ConfigError(
            f"group_size={group_size} does not divide the batch of {rows} rows; choose a group "
            "size that does, or 0 for the whole batch as one group"
        )
    return rows // size, size


def _blank(x: jax.Array, valid: jax.Array) -> jax.Array:
    """`x` with zeros in the rows that do not count."""
    return jnp.where(valid.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)


def matching_batch(
    media: jax.Array,
    text: jax.Array,
    text_mask: jax.Array,
    media_negative: jax.Array,
    text_negative: jax.Array,
    group_size: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Puts together what the fusion layers judge: pairs, then two kinds of wrong pairs.

    One behind the other, as the original has them. On several devices that moves rows between
    them; there put a row's three pairs beside each other, with `take_in_groups`.

    Args:
        media: `(B, N, C)` video or audio tokens.
        text: `(B, L, D)` hidden states after the text layers.
        text_mask: `(B, L)`.
        media_negative: int `(B,)`, the media to set against each text, by place in its group.
        text_negative: int `(B,)`, the text to set against each media, likewise.
        group_size: rows of a group, as in `mine_negatives`; 0 for the whole batch.

    Returns:
        Media `(3B, N, C)`, text `(3B, L, D)` and its mask `(3B, L)`: B true pairs, B texts with
        wrong media, B media with wrong texts.

    Raises:
        ConfigError: B does not divide into groups.
    """
    wrong_media = take_in_groups(media, media_negative, group_size)
    wrong_text, wrong_mask = (
        take_in_groups(x, text_negative, group_size) for x in (text, text_mask)
    )
    return (
        jnp.concatenate([media, wrong_media, media]),
        jnp.concatenate([text, text, wrong_text]),
        jnp.concatenate([text_mask, text_mask, wrong_mask]),
    )


def matching_loss(
    logits: jax.Array,
    has_media_negative: jax.Array | None = None,
    has_text_negative: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Mean cross entropy of telling true pairs from wrong ones.

    Args:
        logits: `(3B, 2)` in the order of `matching_batch`; class 1 = they belong together.
        has_media_negative: bool `(B,)`, `Negatives.found` of the media; None for all.
        has_text_negative: bool `(B,)`, likewise of the texts.
        valid: bool `(B,)`, rows that count with any of their three pairs; None for all.

    Returns:
        float32 scalar, over the pairs that there are; 0 where there is none.
    """
    batch = logits.shape[0] // 3
    valid = jnp.ones(batch, bool) if valid is None else valid
    log_shares = jax.nn.log_softmax(logits.astype(jnp.float32), axis=1)
    losses = -jnp.concatenate([log_shares[:batch, 1], log_shares[batch:, 0]])
    counts = jnp.concatenate(
        [
            valid if given is None else valid & given
            for given in (None, has_media_negative, has_text_negative)
        ]
    )
    return jnp.sum(jnp.where(counts, losses, 0.0)) / jnp.maximum(jnp.sum(counts), 1)
