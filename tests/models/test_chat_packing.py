"""Packed rows: dialogues of one row are what they are alone, and the head reads targets only."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.models import kinds
from iv2_jax.models.chat import Chat
from iv2_jax.models.llm import Llm
from iv2_jax.objectives.next_token import next_token_loss, next_token_loss_of, target_weights
from tests.train import tiny_instruct as tiny

CONFIG = tiny.model()
COUNT = CONFIG.bridge.num_tokens
LENGTHS = (COUNT + 9, COUNT + 14, 6)  # two with a view, one of text alone


@pytest.fixture(scope="module")
def params():
    return tiny.draw(kinds.of(CONFIG).abstract_params(CONFIG))


@pytest.fixture(scope="module")
def rows():
    """Three dialogues in one row, and the same in rows of their own."""
    rng = np.random.default_rng(0)
    length = sum(LENGTHS) + 5
    video = rng.normal(size=(1, 2, 2, 28, 28, 3)).astype(np.float32)
    told = rng.integers(3, 30, (1, 2, 4))
    packed = {name: np.full((1, length), value, np.int32) for name, value in _EMPTY.items()}
    alone, start = [], 0
    for number, size in enumerate(LENGTHS):
        own = {name: np.full((1, length), value, np.int32) for name, value in _EMPTY.items()}
        own["tokens"][0, :size] = rng.integers(5, tiny.VOCAB, size)
        if number < 2:
            own["visual_index"][0, 2 : 2 + COUNT] = np.arange(COUNT)
        own["targets"][0, size - 4 : size] = own["tokens"][0, size - 4 : size]
        own["segment_ids"][0, :size] = 1
        own["positions"][0, :size] = np.arange(size)
        place = slice(start, start + size)
        for name in packed:
            packed[name][0, place] = own[name][0, :size]
        packed["segment_ids"][0, place] = number + 1
        slots = own["visual_index"][0, :size]
        packed["visual_index"][0, place] = np.where(slots >= 0, slots + number * COUNT, -1)
        view = slice(min(number, 1), min(number, 1) + 1)
        media = {"video": video[:, view], "bridge_ids": told[:, view]}
        alone.append(own | media)
        start += size
    del packed["positions"]  # they are counted in every dialogue
    return packed | {"video": video, "bridge_ids": told}, alone


_EMPTY = {"tokens": 0, "visual_index": -1, "targets": -100, "segment_ids": 0, "positions": 0}


@functools.cache
def _hidden():
    def run(params, batch):
        inputs = {k: v for k, v in batch.items() if k != "targets"}
        return Chat(CONFIG).apply({"params": params}, **inputs, method="hidden")

    return jax.jit(run)


def test_a_dialogue_of_a_packed_row_is_what_it_is_alone(params, rows):
    packed, alone = rows
    together, start = _hidden()(params, packed), 0
    for size, own in zip(LENGTHS, alone, strict=True):
        single = _hidden()(params, own)[0, :size]
        np.testing.assert_allclose(together[0, start : start + size], single, atol=1e-5)
        start += size


def test_no_dialogue_sees_another(params, rows):
    packed, _ = rows
    before = _hidden()(params, packed)
    changed = packed | {"tokens": packed["tokens"].copy(), "video": packed["video"].copy()}
    changed["tokens"][0, 0] = 7
    changed["video"][0, 0] = 0.5
    after, first = _hidden()(params, changed), LENGTHS[0]
    np.testing.assert_array_equal(after[:, first:], before[:, first:])
    assert np.abs(after[:, :first] - before[:, :first]).max() > 1e-3


def test_the_head_at_targets_alone_gives_loss_and_gradients_of_all_places(params, rows):
    packed = rows[0]
    hidden = np.asarray(_hidden()(params, packed))
    llm, targets = Llm(CONFIG.llm), jnp.asarray(packed["targets"])

    def logits(head, x, number=None, extra=None):
        return llm.apply({"params": head}, x, method="logits")

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def whole(head, hidden):
        return next_token_loss(logits(head, hidden), targets)[0]

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def few(head, hidden, capacity):
        weights = target_weights(targets)
        return next_token_loss_of(logits, head, hidden, targets, weights, capacity=capacity)

    head = {"head": params["llm"]["head"]}
    value, grads = whole(head, hidden)
    accuracy = next_token_loss(logits(head, hidden), targets)[1]["accuracy"]
    for capacity in (5, 1000):
        (loss, hits), own = few(head, hidden, capacity)
        np.testing.assert_allclose(loss, value, rtol=1e-6)
        np.testing.assert_allclose(hits, accuracy, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), own, grads)
