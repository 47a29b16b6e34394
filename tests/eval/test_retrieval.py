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


def _ground_truth(rng):
    relevant = rng.random((9, 13)) < 0.15
    relevant[np.arange(9), np.arange(9)] = True
    relevant[0, 9:] = True
    return relevant, rng.integers(1, 4, 13)


def test_chance_is_what_random_scores_get():
    rng = np.random.default_rng(0)
    relevant, counts = _ground_truth(rng)
    chance = retrieval.chance_metrics(relevant, counts)
    drawn, ranks = {}, {"v2t": [], "t2v": []}
    for _ in range(4000):
        scores = rng.random((9, 13))
        for name, value in retrieval.ranking_metrics(scores, scores.T, relevant, counts).items():
            drawn.setdefault(name, []).append(value)
        ranks["v2t"].append(retrieval.ranks(scores, relevant))
        ranks["t2v"].append(np.repeat(retrieval.ranks(scores.T, relevant.T), counts))
    assert set(chance) == set(drawn)
    for name, values in drawn.items():
        if "median" in name:
            expected = np.median(np.concatenate(ranks[name[:3]])) + 1
            assert chance[name] == expected, name
        else:
            error = np.std(values) / np.sqrt(len(values))
            assert abs(np.mean(values) - chance[name]) < 5 * error + 1e-9, name


def test_chance_of_one_right_candidate_each():
    chance = retrieval.chance_metrics(np.eye(40, dtype=bool))
    assert chance["t2v_r1"] == pytest.approx(2.5)
    assert chance["v2t_r10"] == pytest.approx(25)
    assert chance["t2v_median_rank"] == 20
    # Fewer candidates than K: everything is found.
    assert retrieval.chance_metrics(np.eye(3, dtype=bool))["t2v_r5"] == 100


def test_captions_that_occur_often_count_often():
    scores = np.array([[0.9, 0.8], [0.1, 0.2]])
    relevant = np.eye(2, dtype=bool)
    metrics = retrieval.ranking_metrics(scores, scores.T, relevant, np.array([3, 1]))
    assert metrics["t2v_r1"] == 75  # the second text prefers the first item
    assert metrics["t2v_median_rank"] == 1
    once = retrieval.ranking_metrics(scores, scores.T, relevant)
    assert once["t2v_r1"] == 50
    assert {k: v for k, v in once.items() if "median" not in k} == retrieval.retrieval_metrics(
        scores, scores.T, np.arange(2)
    )
