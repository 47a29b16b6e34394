"""Matching: how negatives are weighted and drawn, what is judged, and the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv2_jax.errors import ConfigError
from iv2_jax.objectives.matching import (
    draw_negatives,
    matching_batch,
    matching_loss,
    mine_negatives,
    negative_weights,
    take_in_groups,
    uniform_weights,
)
from iv2_jax.parallel.mesh import AXES, BATCH_AXES


def test_weights_are_shares_without_equal_ids():
    scores = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [5.0, 1.0, 2.0]])
    weights = np.asarray(negative_weights(scores, jnp.array([7, 8, 7])))
    shares = np.asarray(jax.nn.softmax(scores, axis=1))
    np.testing.assert_allclose(weights[1], [shares[1, 0], 0, shares[1, 2]], rtol=1e-6)
    np.testing.assert_allclose(weights[0], [0, shares[0, 1], 0], rtol=1e-6)


def test_what_is_not_finite_counts_little():
    scores = jnp.array([[jnp.nan, 1.0], [0.0, 0.0]])
    weights = np.asarray(negative_weights(scores, jnp.array([0, 1])))
    np.testing.assert_allclose(weights[0], [0, 0.01])


def test_no_gradient_flows_through_the_weights():
    gradient = jax.grad(lambda s: negative_weights(s, jnp.arange(3))[0, 1])(jnp.eye(3))
    assert (gradient == 0).all()


def test_draws_follow_the_weights_and_never_a_zero():
    weights = jnp.tile(jnp.array([[0.0, 3.0, 1.0, 0.0]]), (4000, 1))
    columns, valid = draw_negatives(jax.random.key(0), weights)
    counts = np.bincount(columns, minlength=4) / 4000
    assert counts[0] == counts[3] == 0
    assert counts[1] == pytest.approx(0.75, abs=0.03)
    assert valid.all()
    assert columns.dtype == jnp.int32


def test_draws_are_a_function_of_the_key():
    weights = uniform_weights(jnp.arange(16))
    first, second, other = (draw_negatives(jax.random.key(k), weights)[0] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()
    assert (first != jnp.arange(16)).all()


def test_a_row_without_negatives_is_told():
    ids = jnp.array([5, 5, 6])
    _, valid = draw_negatives(jax.random.key(0), uniform_weights(ids))
    assert valid.tolist() == [True, True, True]
    _, valid = draw_negatives(jax.random.key(0), uniform_weights(ids[:2]))
    assert valid.tolist() == [False, False]


def test_the_batch_is_pairs_then_wrong_media_then_wrong_texts():
    media, text = jnp.arange(3.0).reshape(3, 1, 1), 10 + jnp.arange(3.0).reshape(3, 1, 1)
    mask = jnp.array([[1], [2], [3]])
    tokens, hidden, masks = matching_batch(
        media, text, mask, jnp.array([1, 2, 0]), jnp.array([2, 0, 1])
    )
    assert tokens[:, 0, 0].tolist() == [0, 1, 2, 1, 2, 0, 0, 1, 2]
    assert hidden[:, 0, 0].tolist() == [10, 11, 12, 10, 11, 12, 12, 10, 11]
    assert masks[:, 0].tolist() == [1, 2, 3, 1, 2, 3, 3, 1, 2]


def test_loss_is_the_mean_cross_entropy():
    logits = np.random.default_rng(0).normal(size=(9, 2))
    labels = [1, 1, 1, 0, 0, 0, 0, 0, 0]
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = -np.mean([row[label] for row, label in zip(logs, labels, strict=True)])
    np.testing.assert_allclose(matching_loss(logits), wanted, rtol=1e-5)


def test_pairs_without_a_negative_are_left_out():
    logits = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    valid = jnp.array([True, False])
    damaged = logits.copy()
    damaged[[3, 5]] = 50.0
    results = [matching_loss(x, valid, valid) for x in (logits, damaged)]
    np.testing.assert_allclose(*results)
    assert abs(results[0] - matching_loss(logits)) > 1e-3
    nothing = jnp.zeros(2, bool)
    np.testing.assert_allclose(
        matching_loss(logits, nothing, nothing),
        -np.mean(jax.nn.log_softmax(logits[:2], axis=1)[:, 1]),
        rtol=1e-5,
    )


def _features(rows=16, width=5, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, rows, width)).astype(np.float32)
    return a, b, np.arange(rows)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("group_size", [0, 8, 4])
def test_mined_negatives_are_valid_rows_of_the_group_with_another_id(group_size, hard):
    a, b, ids = _features()
    ids[1], valid = ids[0], np.ones(16, bool)
    valid[[2, 9]] = False
    size = group_size or 16
    seen = set()
    mine = jax.jit(
        lambda key: mine_negatives(
            key, a, b, 0.5, ids, valid=jnp.asarray(valid), group_size=group_size, hard=hard
        )
    )
    for key in range(20):
        index, found = (np.asarray(x) for x in mine(jax.random.key(key)))
        np.testing.assert_array_equal(found, valid)
        partners = np.arange(16) // size * size + index
        assert ((index >= 0) & (index < size))[valid].all()
        assert valid[partners[valid]].all()
        assert (ids[partners] != ids)[valid].all()
        seen |= {(row, partners[row]) for row in np.flatnonzero(valid)}
    assert len(seen) > 16 * 1.5  # they are draws, not the same ones again


def test_hard_negatives_follow_the_similarity():
    """Shares of the draws are those of the original's weights, without the row itself."""
    a, b, ids = _features(rows=4)
    weights = np.asarray(negative_weights(jnp.asarray(_cosines(a, b) / 0.5), jnp.arange(4)))
    wanted = weights / weights.sum(axis=1, keepdims=True)
    copies = 1000  # groups of the same rows
    index, _ = jax.jit(mine_negatives, static_argnames="group_size")(
        jax.random.key(0),
        *(np.tile(x, (copies, 1)) for x in (a, b)),
        0.5,
        np.tile(ids, copies),
        group_size=4,
    )
    index = np.asarray(index).reshape(copies, 4)
    shares = np.stack([np.bincount(index[:, i], minlength=4) / copies for i in range(4)])
    np.testing.assert_allclose(shares, wanted, atol=0.06)


def _cosines(a, b):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


def test_a_low_temperature_leaves_negatives():
    """The true pair takes the whole softmax; the original's draw fails."""
    a, _, ids = _features()
    index, found = mine_negatives(jax.random.key(0), a, a, 1e-3, ids)
    assert found.all()
    assert (index != ids).all()


def test_rows_without_a_partner_are_told():
    a, b, ids = _features(rows=4)
    nan = np.where([[True], [False], [False], [False]], np.nan, a)
    valid = jnp.array([False, True, False, False])
    _, found = mine_negatives(jax.random.key(0), nan, b, 0.1, ids, valid=valid, group_size=2)
    assert not found.any()
    _, found = mine_negatives(jax.random.key(0), a, b, 0.1, jnp.zeros(4, int))
    assert not found.any()


def test_frames_of_a_clip_are_averaged_for_mining():
    a, b, ids = _features()
    frames = np.stack([a, a], axis=1)
    single, double = (
        mine_negatives(jax.random.key(0), x, b, 0.1, ids, group_size=8) for x in (a, frames)
    )
    np.testing.assert_array_equal(single.index, double.index)


def test_groups_of_the_whole_batch_are_the_batch():
    a, b, ids = _features()
    first, second = (
        mine_negatives(jax.random.key(0), a, b, 0.1, ids, group_size=size) for size in (0, 16)
    )
    np.testing.assert_array_equal(first.index, second.index)


def test_places_count_within_the_group():
    media, text = jnp.arange(4.0).reshape(4, 1, 1), 10 + jnp.arange(4.0).reshape(4, 1, 1)
    places = jnp.array([1, 0, 1, 0])
    assert take_in_groups(media, places, 2)[:, 0, 0].tolist() == [1, 0, 3, 2]
    tokens, hidden, _ = matching_batch(media, text, jnp.ones((4, 1)), places, places, 2)
    assert tokens[4:8, 0, 0].tolist() == [1, 0, 3, 2]
    assert hidden[8:, 0, 0].tolist() == [11, 10, 13, 12]


@pytest.mark.parametrize("size", [3, 32, -1])
def test_groups_that_do_not_divide_are_refused(size):
    a, b, ids = _features()
    with pytest.raises(ConfigError, match=f"group_size={size}"):
        mine_negatives(jax.random.key(0), a, b, 0.1, ids, group_size=size)
    with pytest.raises(ConfigError, match=f"group_size={size}"):
        take_in_groups(jnp.asarray(a), jnp.arange(16), size)


def test_rows_that_do_not_count_are_out_of_the_loss():
    logits = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    valid = jnp.array([True, False, True])
    damaged = logits.copy()
    damaged[1::3] = 40.0, np.nan
    kept = np.delete(logits, [1, 4, 7], axis=0)
    np.testing.assert_allclose(matching_loss(damaged, valid=valid), matching_loss(kept), rtol=1e-6)
    assert matching_loss(logits, valid=jnp.zeros(3, bool)) == 0


def _judge(mesh, group_size):
    """Jitted: mining and gathering of tokens, and the gradient through them."""

    def loss(a, b, media, text, ids, key):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            wrong, texts = (
                mine_negatives(k, x, y, 0.1, ids, group_size=group_size)
                for k, x, y in zip(jax.random.split(key), (b, a), (a, b), strict=True)
            )
            wrong = take_in_groups(media, wrong.index, group_size)
            texts = take_in_groups(text, texts.index, group_size)
            scores = jnp.einsum("bnc,blc->b", media, texts) - jnp.einsum("bnc,blc->b", wrong, text)
            return jnp.sum(jnp.sin(scores)), (wrong, texts)

    return jax.jit(jax.value_and_grad(loss, argnums=(2, 3), has_aux=True))


COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize(("group_size", "moves"), [(4, False), (2, False), (8, True), (0, True)])
def test_tokens_of_a_group_stay_on_its_device(group_size, moves):
    """Eight devices of four rows: in the compiled program nothing but sums of scalars crosses."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2, 1), AXES)
    rng = np.random.default_rng(0)
    rows = (
        *rng.normal(size=(2, 32, 5)).astype(np.float32),
        rng.normal(size=(32, 7, 3)).astype(np.float32),
        rng.normal(size=(32, 6, 3)).astype(np.float32),
        np.arange(32),
    )
    alone = _judge(mesh, group_size)(*rows, jax.random.key(0))
    split = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
    key = jax.device_put(jax.random.key(0), NamedSharding(mesh, PartitionSpec()))
    compiled = _judge(mesh, group_size).lower(*split, key).compile()
    text = compiled.as_text()
    found = [name for name in COLLECTIVES if f"{name}(" in text or f"{name}-start(" in text]
    assert bool(found) == moves, found
    if not moves:  # the sum of the loss is the only other one
        sums = [line for line in text.splitlines() if " all-reduce(" in line]
        assert all("= f32[] all-reduce(" in line for line in sums), sums
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        compiled(*split, key),
        alone,
    )
