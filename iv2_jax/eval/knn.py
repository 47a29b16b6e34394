"""Nearest neighbours by cosine in feature space."""

from __future__ import annotations

import numpy as np


def unit(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length one (zero rows stay zero)."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norm, 1e-12)


def neighbours(queries: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` most similar rows of `keys` for each query.

    Args:
      queries: (m, d).
      keys: (n, d); the mean of its rows is taken off both sides first, without which features
        that share a large common part are all alike.
      k: At most n.

    Returns:
      (m, k) indices into `keys`, nearest first, and their cosines.
    """
    mean = keys.mean(0)
    similarity = unit(queries - mean) @ unit(keys - mean).T
    index = np.argsort(-similarity, axis=1, kind="stable")[:, : min(k, len(keys))]
    return index, np.take_along_axis(similarity, index, axis=1)


def knn_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    k: int = 10,
    temperature: float = 0.07,
) -> float:
    """Accuracy of a vote of the `k` nearest training rows, weighted by exp(cosine / temperature).

    Args:
      train: (n, d) features.
      train_labels: (n,) int classes from 0.
      test: (m, d) features.
      test_labels: (m,) int classes.
      k: Neighbours that vote.
      temperature: Of the weights.
    """
    index, cosine = neighbours(test, train, k)
    votes = np.zeros((len(test), int(max(train_labels.max(), test_labels.max())) + 1))
    weights = np.exp((cosine - cosine[:, :1]) / temperature)
    np.add.at(votes, (np.arange(len(test))[:, None], train_labels[index]), weights)
    return float(np.mean(votes.argmax(1) == test_labels))
