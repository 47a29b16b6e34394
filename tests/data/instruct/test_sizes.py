"""Sizes of conversations: measured, shared among processes, kept in a file."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from iv2_jax.data.instruct import sizes
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn
from iv2_jax.data.instruct.sequence import SequenceBuilder, SequenceConfig
from iv2_jax.errors import DataError
from tests.data.instruct.words import Letters, conversations

TALK = Conversation((Turn("q", "a"),), (Medium("image", "x7"), Medium("image", "y")))


def _builder(**options):
    return SequenceBuilder(SequenceConfig(tokens_per_view=2, **options), Letters())


def _views(medium):
    return 2 if medium.path.endswith("7") else 1


def test_sizes_of_conversations():
    found = sizes.measure([TALK], _builder(), _views)
    assert (found.views.tolist(), found.kinds.tolist()) == ([3], [0])
    assert found.lengths[0] == _builder().build(TALK, [2, 1]).length


def test_worker_processes_find_the_same(monkeypatch):
    monkeypatch.setattr(sizes, "_CHUNK", 15)
    talks = conversations(40)
    found = sizes.measure(talks, _builder(), workers=2)
    np.testing.assert_array_equal(found.lengths, sizes.measure(talks, _builder()).lengths)


def test_the_cache_is_used_only_for_the_same(tmp_path, monkeypatch):
    cache = str(tmp_path / "new" / "sizes.npz")
    talks = [*conversations(5), TALK]
    wanted = sizes.measure(talks, _builder(), _views, cache=cache)
    calls = []
    longest = SequenceBuilder.longest
    monkeypatch.setattr(SequenceBuilder, "longest", lambda *args: calls.append(1) or longest(*args))

    def again(talks=talks, builder=None, views=_views):
        calls.clear()
        found = sizes.measure(talks, builder or _builder(), views, cache=cache)
        return len(calls), found

    count, found = again()
    assert count == 0
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    other = dataclasses.replace(TALK, turns=(Turn("q", "b"),))
    tokenizer = Letters()
    tokenizer.vocab_size += 1
    for change in (
        {"talks": [*talks[:-1], other]},
        {"views": sizes.one_view},
        {"builder": _builder(max_length=99)},
        {"builder": SequenceBuilder(_builder().config, tokenizer)},
    ):
        assert again(**change)[0] == 6, change
        assert again(**change)[0] == 0
    whole = (tmp_path / "new" / "sizes.npz").read_bytes()
    for broken in (b"broken", b"", whole[:-30], whole[:100]):
        (tmp_path / "new" / "sizes.npz").write_bytes(broken)
        assert again()[0] == 6
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        sizes.measure(talks, _builder(), cache=str(tmp_path / "file" / "sizes.npz"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["sizes.npz"]
