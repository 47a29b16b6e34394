"""Masked language modelling: corrupting token ids, and the loss over what was hidden.

Source: spec stage2 6.3. Bidirectional, as the released code has it (the paper writes a causal
formula).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
