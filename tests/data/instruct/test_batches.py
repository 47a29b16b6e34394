"""Batches of token sequences: what rows hold, resuming, processes, and text for the bridge."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from iv2_jax.data import prompts
from iv2_jax.data.dialogue import IGNORE
from iv2_jax.data.instruct import batches
from iv2_jax.data.instruct.batches import BatchStream, TokenBatches
from iv2_jax.data.instruct.conversations import Conversation, Turn
from iv2_jax.data.instruct.plan import RowConfig
from iv2_jax.data.instruct.sequence import SequenceBuilder, SequenceConfig
from iv2_jax.data.instruct.sizes import measure
from iv2_jax.data.prompts import BridgeText
from iv2_jax.errors import ConfigError
from tests.data.instruct.words import Letters, conversations

K = 2
HOST = ("kind", "epoch")  # no arrays
PACK = RowConfig("pack", (256,), (4,), max_segments=6, global_batch=4)
BUCKETS = RowConfig("buckets", (64, 128, 256), (1, 2), global_batch=4)


def _views(medium):
    """As with tiles: some files have more."""
    return 2 if medium.path.endswith("7") else 1


def _make(rows, talks=None, **options):
    config = SequenceConfig(max_length=200, tokens_per_view=K)
    talks = conversations(60) if talks is None else talks
    builder = SequenceBuilder(config, Letters())
    return TokenBatches(talks, builder, rows, **{"seed": 3, "num_views": _views} | options)


@pytest.mark.parametrize("rows", [PACK, BUCKETS])
def test_rows_hold_the_sequences_one_after_the_other(rows):
    source = _make(rows)
    seen = []
    for step in range(source.plan.epoch_steps):
        batch = source[step]
        planned = source.plan.batch(step)
        assert batch["kind"] == planned.shape.kind
        assert ("media" in batch) == (batch["kind"] != "text")
        assert batch["tokens"].shape == (4, planned.shape.length)
        for at in range(4):
            row = {name: value[at] for name, value in batch.items() if name not in HOST}
            numbers = [n for n in row["index"].tolist() if n >= 0]
            assert tuple(numbers) == planned.rows[at]
            seen += numbers
            first, view = 0, 0
            for segment, number in enumerate(numbers, start=1):
                shown, wanted = source.sequence(number, 0)
                place = np.flatnonzero(row["segment_ids"] == segment)
                assert place.tolist() == list(range(first, first + wanted.length))
                for name in ("tokens", "targets"):
                    np.testing.assert_array_equal(row[name][place], getattr(wanted, name))
                assert row["positions"][place].tolist() == list(range(wanted.length))
                slots = row["visual_index"][place]
                np.testing.assert_array_equal(slots >= 0, wanted.visual_index >= 0)
                for start, (medium, own) in enumerate(wanted.views):
                    clip = source.clips[row["media"][view]]
                    assert clip.path == shown.media[medium].path
                    assert row["view"][view] == own
                    assert row["view_segment"][view] == segment
                    asked = slots[slots >= 0][start * K : (start + 1) * K]
                    assert asked.tolist() == list(range(view * K, (view + 1) * K))
                    view += 1
                first += wanted.length
            assert not row["mask"][first:].any()
            assert row["mask"][:first].all()
            assert (row["targets"][first:] == IGNORE).all()
            assert (row["visual_index"][first:] == -1).all()
            if view and "media" in row:
                assert (row["media"][view:] == -1).all()
            # No conversation's first token is scored by the one before it.
            starts = np.flatnonzero(row["mask"] & (row["positions"] == 0))
            assert (row["targets"][starts] == IGNORE).all()
    assert sorted(seen) == list(range(60))


def _same(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("rows", [PACK, BUCKETS])
def test_resuming_and_processes_change_nothing(rows):
    whole = BatchStream(_make(rows))
    wanted = [next(whole) for _ in range(2 * whole.source.plan.epoch_steps)]
    start = whole.source.plan.epoch_steps - 2
    again = BatchStream(pickle.loads(pickle.dumps(_make(rows))), start)
    for step in range(start, start + 4):
        _same(next(again), wanted[step])
    parts = [_make(rows, process_index=p, process_count=4) for p in range(4)]
    for step in (0, start, start + 3):
        joined = {name: wanted[step][name] for name in HOST} | {
            name: np.concatenate([part[step][name] for part in parts])
            for name in wanted[step]
            if name not in HOST
        }
        _same(joined, wanted[step])
    other = _make(rows, seed=4)
    assert any(not np.array_equal(other[0]["tokens"], w["tokens"]) for w in wanted[:1])


def test_shapes_are_few_and_padding_is_reported():
    for rows in (PACK, BUCKETS):
        stream = BatchStream(_make(rows))
        shapes = {next(stream)["tokens"].shape for _ in range(stream.source.plan.epoch_steps)}
        assert len(shapes) <= len(stream.source.plan.shapes)
        usage = stream.usage
        # What was planned is an upper bound of each, exact for this tokenizer but for the
        # instruction, which is the first turn's.
        assert usage.padding_share == pytest.approx(stream.source.plan.padding_share, abs=0.01)
        assert usage.cut == usage.cut_rows == 0
        assert 0 < usage.used_views <= usage.views
        assert 0 < usage.targets < usage.tokens < usage.positions


def test_epochs_show_turns_in_other_orders():
    talks = [Conversation(tuple(Turn(f"q{i}", f"a{i}") for i in range(6)))] * 4
    source = _make(BUCKETS, talks)
    shown = {source.sequence(0, epoch)[0].turns for epoch in range(4)}
    assert len(shown) > 1
    assert len({source.sequence(n, 0)[0].turns for n in range(4)}) > 1


def test_cuts_and_what_is_left_out_are_counted():
    long = Turn("q", "a" * 500)
    talks = [Conversation((long,)), Conversation((Turn("q" * 500, "a"),)), *conversations(3)]
    stream = BatchStream(_make(PACK, talks))
    found = [next(stream) for _ in range(stream.source.plan.epoch_steps)]
    assert stream.source.plan.left_out == 1
    assert (stream.usage.cut, stream.usage.cut_rows) == (10 + 500 + 1 - 200, 1)
    assert not any(1 in batch["index"] for batch in found)


def test_visits_longer_than_planned_are_cut():
    """Tokenizers may give a text other ids behind other turns."""
    talks = [Conversation((Turn("q", "a" * 20),), id=str(i)) for i in range(20)]
    builder = SequenceBuilder(SequenceConfig(), Letters())
    sizes = measure(talks, builder)
    short = dataclasses.replace(sizes, lengths=sizes.lengths - 3)
    rows = RowConfig("pack", (4 * (sizes.lengths[0] - 3),), grain=1, global_batch=1)
    stream = BatchStream(_make(rows, talks, sizes=short))
    for _ in range(stream.source.plan.epoch_steps):
        batch = next(stream)
        assert batch["mask"].all()
        assert batch["cut"] == 12
        assert [(batch["segment_ids"] == s).sum() for s in range(1, 5)] == [len("x" * 28)] * 4
    assert stream.usage.cut_rows == 5


def test_an_answer_at_the_very_beginning_is_not_scored_there(monkeypatch):
    bare = prompts.Template(head="", after="", question="", answer="{answer}</s>")
    monkeypatch.setitem(prompts.TEMPLATES, "bare", bare)
    talks = [Conversation((Turn("", "abc"),))] * 3
    config = SequenceConfig(template="bare", compat="released_tuning")
    source = TokenBatches(talks, SequenceBuilder(config, Letters()), PACK, seed=0)
    (row,) = (r for r in source[0]["targets"] if (r >= 0).any())
    assert Letters().decode(row[row >= 0]) == "bc</s>" * 3


def test_text_for_the_bridge():
    source = _make(PACK, bridge=(_tokenizer(8), BridgeText.INSTRUCTION))
    batch = next(b for b in map(source.__getitem__, range(99)) if b["kind"] == "video")
    assert batch["bridge_ids"].shape == (4, 4, 8)
    for row in range(4):
        for view in range(4):
            segment = batch["view_segment"][row, view]
            ids = batch["bridge_ids"][row, view][batch["bridge_mask"][row, view] > 0]
            text = "" if segment == 0 else f"i{batch['index'][row, segment - 1]}"
            assert Letters().decode(ids) == text
    assert "bridge_ids" not in _make(PACK, bridge=(_tokenizer(8), BridgeText.NONE))[0]


def test_files_that_cannot_be_read_leave_the_loss():
    source = _make(PACK)
    batch = next(b for b in map(source.__getitem__, range(99)) if b["kind"] == "video")
    before = batch["targets"].copy()
    gone = {int(batch["media"][0, 0]), int(batch["media"][2, 0])}
    assert batches.leave_out(batch, [*gone, -1]).tolist() == [1, 0, 1, 0]
    for row in range(4):
        for segment in range(1, 7):
            place = batch["segment_ids"][row] == segment
            shows = set(batch["media"][row][batch["view_segment"][row] == segment].tolist())
            if shows & gone:
                assert (batch["targets"][row][place] == IGNORE).all()
            else:
                np.testing.assert_array_equal(batch["targets"][row][place], before[row][place])
    texts = next(b for b in map(source.__getitem__, range(99)) if b["kind"] == "text")
    assert not batches.leave_out(texts, gone).any()
    assert not batches.leave_out(batch, ()).any()


def _tokenizer(max_length):
    tokenizer = Letters()
    tokenizer.max_length = max_length
    return tokenizer


def test_wrong_numbers():
    with pytest.raises(ConfigError, match="global_batch=4 must be a multiple"):
        _make(PACK, process_count=3)
    with pytest.raises(ConfigError, match="process_index=2"):
        _make(PACK, process_index=2, process_count=2)
    with pytest.raises(ConfigError, match="seed must be from 0 on"):
        _make(PACK, seed=-1)
    with pytest.raises(ConfigError, match="start_step"):
        BatchStream(_make(PACK), -1)
