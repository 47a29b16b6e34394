"""Retrieval metrics: ties, several texts an item, bad input."""

from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.errors import DataError
from iv2_jax.eval import retrieval


def test_equal_scores_find_nothing():
    same = np.ones((20, 20))
    metrics = retrieval.retrieval_metrics(same, same, np.arange(20))
    assert set(metrics.values()) == {0.0}


def test_the_best_of_several_texts_counts():
    v2t = np.array([[0.1, 0.9, 0.5], [0.2, 0.3, 0.8]])
    metrics = retrieval.retrieval_metrics(v2t, v2t.T, np.array([0, 0, 1]))
    assert metrics["v2t_r1"] == 100
    assert metrics["t2v_r1"] == pytest.approx(200 / 3)  # text 0 prefers item 1
    np.testing.assert_array_equal(
        retrieval.ranks(v2t.T, np.array([[1, 0], [1, 0], [0, 1]], bool)), [1, 0, 0]
    )


def test_dual_softmax_moves_a_text_that_all_items_like():
    scores = np.array([[0.9, 0.8], [0.9, 0.1]])
    assert retrieval.dual_softmax(scores)[0].argmax() == 1


@pytest.mark.parametrize(
    ("v2t", "texts", "message"),
    [
        (np.full((2, 2), np.nan), [0, 1], "NaN"),
        (np.eye(2), [0, 0], "query 1 has no right candidate"),
        (np.eye(2), [0, 1, 1], "do not fit 3 texts"),
    ],
)
def test_bad_input(v2t, texts, message):
    with pytest.raises(DataError, match=message):
        retrieval.retrieval_metrics(v2t, v2t.T, np.array(texts))
