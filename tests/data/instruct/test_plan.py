"""Rows and batches by step: every conversation once an epoch, static shapes, little padding."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from iv2_jax.data.instruct.plan import KINDS, Plan, RowConfig, Sizes, best_fit
from iv2_jax.errors import ConfigError, DataError


def _sizes(count=200, seed=0, most_views=1):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(3, count, p=(0.3, 0.1, 0.6)).astype(np.int8)
    lengths = np.clip(rng.lognormal(4, 0.7, count), 2, 256).astype(np.int32)
    views = np.where(kinds == KINDS.index("text"), 0, rng.integers(1, most_views + 1, count))
    return Sizes(lengths, views.astype(np.int32), kinds)


CONFIGS = {
    "buckets": RowConfig("buckets", (64, 128, 256), (1,), global_batch=4),
    "larger batches": RowConfig("buckets", (64, 128, 256), global_batch=2, same_tokens=True),
    "views": RowConfig("buckets", (64, 256), (2, 5), global_batch=4),
    "pack": RowConfig("pack", (64, 256), (4,), max_segments=3, global_batch=4),
    "pack views": RowConfig("pack", (256,), (3, 5), global_batch=2),
    "one batch": RowConfig("pack", (256,), (400,), max_segments=400, global_batch=512),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_epoch_shows_everything_once_within_its_rows(name):
    config = CONFIGS[name]
    sizes = _sizes(most_views=config.views[-1])
    plan = Plan(sizes, config, seed=1)
    for epoch in (0, 3):
        seen = []
        shapes = set()
        tokens = positions = 0
        for step in range(epoch * plan.epoch_steps, (epoch + 1) * plan.epoch_steps):
            batch = plan.batch(step)
            shape = batch.shape
            shapes.add(shape)
            assert batch.epoch == epoch
            assert len(batch.rows) == shape.rows == config.rows(shape.length)
            assert any(batch.rows)
            for row in batch.rows:
                members = list(row)
                seen += members
                assert len(members) <= (config.max_segments if config.mode == "pack" else 1)
                assert sizes.lengths[members].sum() <= shape.length
                assert sizes.views[members].sum() <= shape.views
                assert {KINDS[k] for k in sizes.kinds[members]} <= {shape.kind}
                tokens += sizes.lengths[members].sum()
                positions += shape.length
        assert sorted(seen) == list(range(200))
        assert shapes == set(plan.shapes)
        assert plan.padding_share == pytest.approx(1 - tokens / positions)


@pytest.mark.parametrize("name", ["buckets", "pack"])
def test_steps_follow_from_seed_and_step_alone(name):
    sizes = _sizes()
    plan = Plan(sizes, CONFIGS[name], seed=1)
    steps = range(3 * plan.epoch_steps)
    wanted = [plan.batch(step) for step in steps]
    for step in (5, 2, plan.epoch_steps + 1, 3 * plan.epoch_steps - 1, 0):
        assert Plan(sizes, CONFIGS[name], seed=1).batch(step) == wanted[step]
    epochs = [wanted[i :: plan.epoch_steps] for i in range(plan.epoch_steps)]
    assert any(len({batch.rows for batch in same}) > 1 for same in epochs)
    assert [Plan(sizes, CONFIGS[name], seed=2).batch(step) for step in steps] != wanted
    # Another order of the batches, and other rows in them.
    size = plan.epoch_steps
    first, second = ([b.shape for b in wanted[e * size : (e + 1) * size]] for e in (0, 1))
    assert first != second
    assert sorted(first, key=str) == sorted(second, key=str)
    rows = [
        {row for batch in wanted[e * plan.epoch_steps :][: plan.epoch_steps] for row in batch.rows}
        for e in range(3)
    ]
    if name == "pack":
        assert len(rows[0] & rows[1]) < len(rows[0]) / 4
    still = Plan(sizes, RowConfig(lengths=(256,), global_batch=4, shuffle=False), seed=1)
    assert still.batch(1).rows == still.batch(1 + still.epoch_steps).rows


@pytest.mark.parametrize("config", [RowConfig(lengths=(256,)), RowConfig("pack", (256,))])
def test_rows_of_like_conversations_are_spread(config):
    """Batches are no longer runs of the sorted order."""
    sizes = _sizes(400)
    plan = Plan(sizes, dataclasses.replace(config, views=(8,)), seed=0)
    batches = [plan.batch(step) for step in range(plan.epoch_steps)]
    longest = [[sizes.lengths[list(row)].max() for row in b.rows] for b in batches if all(b.rows)]
    spread = np.mean([np.ptp(row) for row in longest])
    assert spread > np.ptp(longest) / 4


def test_leftovers_go_to_longer_rows():
    """Batches that are not full exist only at the longest length of a kind."""
    sizes = Sizes(
        np.array([10] * 5 + [20] * 6 + [40] * 4, np.int32),
        np.ones(15, np.int32),
        np.full(15, KINDS.index("video"), np.int8),
    )
    plan = Plan(sizes, RowConfig(lengths=(16, 32, 64), global_batch=4), seed=0)
    batches = [plan.batch(step) for step in range(plan.epoch_steps)]
    full = {b.shape.length: sum(bool(r) for r in b.rows) for b in batches if not all(b.rows)}
    assert full == {64: 3}
    assert sorted(b.shape.length for b in batches) == [16, 32, 64, 64]
    short = Plan(
        Sizes(np.array([10] * 5, np.int32), np.ones(5, np.int32), sizes.kinds[:5]),
        RowConfig(lengths=(16, 32, 64), global_batch=4),
        seed=0,
    )
    assert {shape.length for shape in short.shapes} == {16}  # nothing needs the longer ones


def test_best_fit_is_best_fit():
    """Against a search through all rows."""
    rng = np.random.default_rng(0)
    for case in range(20):
        lengths = sorted(rng.integers(1, 60, 80).tolist(), reverse=True)
        views = rng.integers(0, 4, 80).tolist()
        length, most, segments = 64, 5, int(rng.integers(1, 9))
        rows = best_fit(lengths, views, length, most, segments)
        assert sorted(itertools.chain(*rows)) == list(range(80))
        naive = []
        for item in range(80):
            rooms = [
                (length - sum(lengths[i] for i in row) - lengths[item], at)
                for at, row in enumerate(naive)
                if len(row) < segments
                and sum(views[i] for i in row) + views[item] <= most
                and sum(lengths[i] for i in row) + lengths[item] <= length
            ]
            if rooms:
                naive[min(rooms)[1]].append(item)
            else:
                naive.append([item])
        assert abs(len(naive) - len(rows)) <= 1, case  # ties go elsewhere
        for row in rows:
            assert sum(lengths[i] for i in row) <= length
            assert sum(views[i] for i in row) <= most
            assert len(row) <= segments


def test_padding_by_mode():
    """What the two modes are for: the same conversations, less padding each time."""
    sizes = _sizes(2000)
    shares = [
        Plan(sizes, config, seed=0).padding_share
        for config in (
            RowConfig(lengths=(256,), global_batch=4),
            RowConfig(lengths=(64, 128, 256), global_batch=4),
            RowConfig("pack", (256,), (8,), global_batch=4),
        )
    ]
    assert shares[0] > 2 * shares[1] > 4 * shares[2]
    assert shares[2] < 0.08


def test_what_cannot_be_planned():
    sizes = _sizes(most_views=3)
    with pytest.raises(ConfigError, match=r"conversation \d+ has views=3, rows have at most 2"):
        Plan(sizes, RowConfig(lengths=(256,), views=(1, 2)), seed=0)
    with pytest.raises(ConfigError, match=r"has lengths=\d+, rows have at most 64: .*max_length"):
        Plan(sizes, RowConfig(lengths=(64,), views=(3,)), seed=0)
    left = Sizes(np.where(sizes.lengths > 60, 0, sizes.lengths), sizes.views, sizes.kinds)
    plan = Plan(left, RowConfig(lengths=(64,), views=(3,)), seed=0)
    assert plan.left_out == (left.lengths == 0).sum()
    with pytest.raises(DataError, match="none of 200 conversations has an answer"):
        Plan(Sizes(sizes.lengths * 0, sizes.views, sizes.kinds), RowConfig(), seed=0)
    for options, words in (
        ({"mode": "packed"}, "did you mean 'pack'"),
        ({"lengths": (4, 2)}, r"lengths=\(4, 2\): ascending"),
        ({"views": ()}, r"views=\(\)"),
        ({"max_segments": 0}, "max_segments must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            RowConfig(**options)
