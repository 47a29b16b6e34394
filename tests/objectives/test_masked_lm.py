"""Masked language modelling: shares of corrupted tokens, specials, labels and the loss."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv2_jax.errors import ConfigError
from iv2_jax.objectives.masked_lm import (
    IGNORED,
    corrupt,
    masked_lm_loss,
    masked_lm_loss_of,
    masked_lm_sums,
    masked_positions,
)
from iv2_jax.parallel.mesh import AXES, BATCH_AXES

PAD, CLS, MASK, VOCAB = 0, 2, 4, 1000


def _corrupt(ids, key=0, **options):
    return corrupt(
        jax.random.key(key), ids, vocab_size=VOCAB, mask_id=MASK, special_ids=(PAD, CLS), **options
    )


@pytest.fixture(scope="module")
def big():
    ids = jnp.asarray(np.random.default_rng(0).integers(10, VOCAB, (200, 100)))
    return ids, *_corrupt(ids)


def test_half_of_the_tokens_are_chosen(big):
    ids, _, labels = big
    chosen = labels != IGNORED
    assert chosen.mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(labels[chosen], ids[chosen])


def test_of_them_four_fifths_are_hidden_a_tenth_replaced_a_tenth_kept(big):
    ids, corrupted, labels = big
    chosen = labels != IGNORED
    hidden = (corrupted == MASK)[chosen].mean()
    kept = (corrupted == ids)[chosen].mean()
    assert hidden == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.02)
    assert 1 - hidden - kept == pytest.approx(0.1, abs=0.02)


def test_the_others_stay(big):
    ids, corrupted, labels = big
    left = labels == IGNORED
    np.testing.assert_array_equal(corrupted[left], ids[left])


def test_specials_are_never_chosen():
    ids = jnp.tile(jnp.array([[CLS, 50, 51, PAD, PAD]]), (100, 1))
    corrupted, labels = _corrupt(ids, probability=1.0)
    assert (labels[:, jnp.array([0, 3, 4])] == IGNORED).all()
    np.testing.assert_array_equal(labels[:, 1:3], ids[:, 1:3])
    np.testing.assert_array_equal(corrupted[:, 3:], ids[:, 3:])


def test_corruption_is_a_function_of_the_key():
    ids = jnp.arange(10, 110).reshape(4, 25)
    first, again, other = (_corrupt(ids, key) for key in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first[0] != other[0]).any()
    assert first[0].dtype == ids.dtype


def test_loss_is_the_mean_over_labelled_places():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    labels = jnp.array([[IGNORED, 4, IGNORED], [0, IGNORED, 2]])
    logs = jax.nn.log_softmax(logits, axis=-1)
    wanted = -np.mean([logs[0, 1, 4], logs[1, 0, 0], logs[1, 2, 2]])
    np.testing.assert_allclose(masked_lm_loss(logits, labels), wanted, rtol=1e-5)


def test_nothing_to_guess_is_zero_with_a_zero_gradient():
    labels = jnp.full((1, 2), IGNORED)
    value, gradient = jax.value_and_grad(masked_lm_loss)(jnp.ones((1, 2, 3)), labels)
    assert value == 0
    assert (gradient == 0).all()


def test_sums_of_shards_make_the_whole():
    logits = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    labels = np.full((4, 3), IGNORED)
    labels[0], labels[1, 1], labels[3, 2] = [1, 2, 3], 0, 4
    parts = [masked_lm_sums(logits[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    total, count = (sum(x) for x in zip(*parts, strict=True))
    assert count == 5
    np.testing.assert_allclose(total / count, masked_lm_loss(logits, labels), rtol=1e-6)


def test_positions_are_the_labelled_places():
    labels = jnp.full((3, 6), IGNORED).at[0, jnp.array([1, 4])].set(7).at[2].set(7)
    index, fits = masked_positions(labels, 3)
    assert index.tolist() == [[1, 4, 6], [6, 6, 6], [0, 1, 2]]
    assert fits.tolist() == [True, True, False]
    assert masked_positions(labels[0], 2)[1]
    assert index.dtype == jnp.int32


class _Words(nn.Module):
    """A text tower in small: embeddings that are also the vocabulary's, and a head."""

    vocab: int = 11

    def setup(self):
        self.embed = nn.Embed(self.vocab, 5)
        self.head = nn.Dense(5)

    def __call__(self, ids):
        return self.word_logits(self.embed(ids))

    def word_logits(self, hidden):
        return self.embed.attend(nn.gelu(self.head(hidden)))

    def loss(self, ids, labels, capacity, scale=1.0):
        hidden = jnp.sin(self.embed(ids))
        if capacity is None:
            return scale * masked_lm_loss(self.word_logits(hidden), labels)
        return scale * masked_lm_loss_of(hidden, labels, self.word_logits, capacity)


@pytest.fixture(scope="module")
def words():
    """Module, parameters, ids, and labels at 5 of 32 places."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 11, (8, 4)))
    labels = np.full(32, IGNORED)
    labels[[3, 4, 5, 17, 30]] = np.asarray(ids).reshape(-1)[[3, 4, 5, 17, 30]]
    module = _Words()
    return module, module.init(jax.random.key(0), ids), ids, jnp.asarray(labels.reshape(8, 4))


def _loss_step(module, capacity, scale=1.0):
    def loss(params, ids, labels):
        return module.apply(params, ids, labels, capacity, scale, method="loss")

    return jax.jit(jax.value_and_grad(loss))


def _same(got, wanted):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), got, wanted)


@pytest.mark.parametrize("capacity", [1, 4, 5, 6, 31, 32, 100])
def test_logits_of_few_places_give_the_plain_loss(words, capacity):
    """Whether the labelled places fit or not; parameters that come twice get both gradients."""
    module, params, ids, labels = words
    wanted = _loss_step(module, None, 3.0)(params, ids, labels)
    _same(_loss_step(module, capacity, 3.0)(params, ids, labels), wanted)


@pytest.mark.parametrize("capacity", [2, 16])
def test_no_place_or_every_place_has_a_label(words, capacity):
    module, params, ids, labels = words
    step = _loss_step(module, capacity)
    value, grads = step(params, ids, jnp.full_like(labels, IGNORED))
    assert value == 0
    assert all((x == 0).all() for x in jax.tree.leaves(grads))
    _same(step(params, ids, ids), _loss_step(module, None)(params, ids, ids))


def test_only_the_capacity_is_computed_when_it_suffices():
    """The full branch would be infinite here: its logits are marked by their number."""
    hidden, labels = jnp.ones((4, 8, 3)), jnp.full((4, 8), IGNORED).at[2, 3].set(1)

    def logits(x):
        return x * (jnp.inf if x.size == hidden.size else 2.0)

    assert jnp.isfinite(masked_lm_loss_of(hidden, labels, logits, 4))
    assert not jnp.isfinite(masked_lm_loss_of(hidden, labels.at[0].set(1), logits, 4))


def test_capacity_must_be_positive():
    with pytest.raises(ConfigError, match="capacity=0"):
        masked_lm_loss_of(jnp.ones((1, 2, 3)), jnp.zeros((1, 2), int), lambda x: x, 0)


@pytest.mark.parametrize("capacity", [8, 24])
def test_devices_look_at_their_own_rows(words, capacity):
    """On eight devices the loss is the same, and no hidden state leaves its device."""
    module, params, ids, labels = words
    wanted = _loss_step(module, None)(params, ids, labels)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4, 1), AXES)
    split, whole = (NamedSharding(mesh, PartitionSpec(*x)) for x in ((BATCH_AXES,), ()))

    def loss(params, ids, labels):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return module.apply(params, ids, labels, capacity, method="loss")

    step = jax.jit(jax.value_and_grad(loss), in_shardings=(whole, split, split))
    compiled = step.lower(params, ids, labels).compile()
    text = compiled.as_text()
    for name in ("all-gather(", "all-to-all(", "collective-permute("):
        assert name not in text
    _same(compiled(params, *jax.device_put((ids, labels), split)), wanted)
