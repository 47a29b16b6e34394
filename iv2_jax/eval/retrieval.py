"""Scores and metrics of retrieval and multiple choice, in NumPy (spec stage2 9).

Text k belongs to media item `item_of_text[k]`; an item may have several texts. `v2t` scores have
a row for each item and a column for each text, `t2v` the other way round.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from iv2_jax.errors import DataError

RECALLS = (1, 5, 10)


def cosine_scores(
    items: np.ndarray,
    texts: np.ndarray,
    *,
    frames: Literal["mean", "max"] = "mean",
    temperature: float = 1.0,
) -> np.ndarray:
    """Cosine of every item with every text.

    Args:
        items: (V, D) features, or (V, F, D) with one for each of F frames or clips.
        texts: (T, D).
        frames: how the cosines of an item's frames become one.
        temperature: divides the cosines; the original's evaluations leave it at 1.

    Returns:
        (V, T) `v2t` scores, float32.
    """
    items, texts = _unit(items), _unit(texts)
    if items.ndim == 2:
        return items @ texts.T / temperature
    scores = np.einsum("vfd,td->vft", items, texts) / temperature
    return scores.mean(1) if frames == "mean" else scores.max(1)


def dual_softmax(scores: np.ndarray) -> np.ndarray:
    """Scales (N, M) scores by each query's share in its candidate, temperature 1.

    Queries are rows; apply it to the transpose, not transpose its result, for the other direction.
    """
    return scores * softmax(scores, axis=0)


def softmax(scores: np.ndarray, axis: int = -1) -> np.ndarray:
    """Softmax along an axis; stage 2 applies it to every row of its scores before ranking."""
    scores = np.exp(scores - scores.max(axis=axis, keepdims=True))
    return scores / scores.sum(axis=axis, keepdims=True)


def ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """How many wrong candidates stand before the best right one, for each query.

    Ties count against the query: scores that are all equal find nothing. (The original's order of
    ties is its sort's.)

    Args:
        scores: (N, M), larger is better.
        relevant: bool (N, M).

    Returns:
        int (N,), 0 for a query whose first candidate is right.

    Raises:
        DataError: scores are not finite, or a query has nothing right to find.
    """
    if not np.isfinite(scores).all():
        raise DataError("retrieval scores hold NaN or infinity")
    if not relevant.any(axis=1).all():
        missing = int(np.argmin(relevant.any(axis=1)))
        raise DataError(f"query {missing} has no right candidate")
    best = np.where(relevant, scores, -np.inf).max(axis=1, keepdims=True)
    return ((scores >= best) & ~relevant).sum(axis=1)


def retrieval_metrics(
    v2t: np.ndarray, t2v: np.ndarray, item_of_text: np.ndarray
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions, in percent, as the original reports them.

    Args:
        v2t: (V, T) scores.
        t2v: (T, V) scores.
        item_of_text: int (T,), the item each text belongs to.

    Returns:
        `{v2t,t2v}_r{1,5,10}`, `{v2t,t2v}_r_mean` (mean of the three) and `r_mean` (mean of both),
        not rounded.

    Raises:
        DataError: shapes do not fit, or see `ranks`.
    """
    count, texts = v2t.shape
    if t2v.shape != (texts, count) or item_of_text.shape != (texts,):
        raise DataError(f"scores {v2t.shape} and {t2v.shape} do not fit {len(item_of_text)} texts")
    relevant = item_of_text[None] == np.arange(count)[:, None]
    return _recalls({"v2t": ranks(v2t, relevant), "t2v": ranks(t2v, relevant.T)})


def ranking_metrics(
    v2t: np.ndarray,
    t2v: np.ndarray,
    relevant: np.ndarray,
    text_counts: np.ndarray | None = None,
) -> dict[str, float]:
    """Recalls as `retrieval_metrics`, and median ranks, for any ground truth.

    Args:
        v2t: (V, T) scores.
        t2v: (T, V) scores.
        relevant: bool (V, T), which text is right for which item.
        text_counts: int (T,), how often each text counts as a query; None = once.

    Returns:
        What `retrieval_metrics` returns, and `{v2t,t2v}_median_rank`, from 1 on.

    Raises:
        DataError: see `ranks`.
    """
    rank = {"v2t": ranks(v2t, relevant), "t2v": ranks(t2v, relevant.T)}
    if text_counts is not None:
        rank["t2v"] = np.repeat(rank["t2v"], text_counts)
    median = {f"{name}_median_rank": float(np.median(r)) + 1 for name, r in rank.items()}
    return _recalls(rank) | median


def _recalls(rank: dict[str, np.ndarray]) -> dict[str, float]:
    """Recalls in percent, and their means, of the ranks of both directions."""
    metrics = {}
    for name, values in rank.items():
        for k in RECALLS:
            metrics[f"{name}_r{k}"] = 100.0 * float((values < k).mean())
        metrics[f"{name}_r_mean"] = float(np.mean([metrics[f"{name}_r{k}"] for k in RECALLS]))
    metrics["r_mean"] = (metrics["v2t_r_mean"] + metrics["t2v_r_mean"]) / 2
    return metrics


def chance_metrics(relevant: np.ndarray, text_counts: np.ndarray | None = None) -> dict[str, float]:
    """What candidates in random order are expected to give, for the same ground truth.

    With g right ones among M candidates none is among the first K with probability
    `C(M - g, K) / C(M, K)`.

    Args:
        relevant: bool (V, T).
        text_counts: int (T,), as in `ranking_metrics`.

    Returns:
        The names of `ranking_metrics`; the median rank is that of all queries' ranks together.
    """
    metrics = {}
    queries = {"v2t": (relevant, None), "t2v": (relevant.T, text_counts)}
    for name, (right, counts) in queries.items():
        found = _found_within(right.sum(axis=1), right.shape[1], counts)
        for k in RECALLS:
            metrics[f"{name}_r{k}"] = 100.0 * float(found[min(k, len(found)) - 1])
        metrics[f"{name}_r_mean"] = float(np.mean([metrics[f"{name}_r{k}"] for k in RECALLS]))
        metrics[f"{name}_median_rank"] = float(np.argmax(found >= 0.5 - 1e-12)) + 1
    metrics["r_mean"] = (metrics["v2t_r_mean"] + metrics["t2v_r_mean"]) / 2
    return metrics


def _found_within(right: np.ndarray, candidates: int, counts: np.ndarray | None) -> np.ndarray:
    """(M,) probability that something right is among the first 1, 2, ... M of a random order."""
    numbers, which = np.unique(right, return_inverse=True)
    weights = np.bincount(which, weights=counts, minlength=len(numbers)).astype(float)
    places = np.arange(candidates)
    still_wrong = np.clip((candidates - numbers[:, None] - places) / (candidates - places), 0, 1)
    return (weights / weights.sum()) @ (1 - np.cumprod(still_wrong, axis=1))


def choice_probabilities(items: np.ndarray, options: np.ndarray, temperature: float) -> np.ndarray:
    """Multiple choice: softmax of cosines over each item's own options.

    Args:
        items: (N, D).
        options: (N, K, D) features of K answers.
        temperature: divides the cosines.

    Returns:
        (N, K).
    """
    scores = np.einsum("nd,nkd->nk", _unit(items), _unit(options))
    return softmax(scores / temperature)


def _unit(x: np.ndarray) -> np.ndarray:
    """Vectors of the last axis at unit length, float32."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
