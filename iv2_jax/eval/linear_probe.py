"""Multinomial logistic regression on frozen features, fitted by L-BFGS in one compiled loop."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Weight of the squared norm against the mean log loss; the best of them by cross-validation.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
ITERATIONS = 100


@dataclass(frozen=True)
class ProbeResult:
    """A fitted probe's answers on the held-out rows.

    Attributes:
      accuracy: Share of held-out rows that are right, in [0, 1].
      predictions: (n,) int, predicted class of each held-out row.
      penalty: The penalty that cross-validation on the training rows chose.
    """

    accuracy: float
    predictions: np.ndarray
    penalty: float


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    folds: int = 3,
    seed: int = 0,
) -> ProbeResult:
    """Fits on `train`, answers on `test`; the penalty is chosen on `train` alone.

    Args:
      train: (n, d) features, standardised here by their own mean and deviation.
      train_labels: (n,) int classes from 0.
      test: (m, d) features.
      test_labels: (m,) int classes.
      groups: (n,) ids of rows that must fall into one fold together (clips of one recording).
      folds: Cross-validation folds.
      seed: Of the folds.
    """
    mean, deviation = train.mean(0), train.std(0)
    # A feature that never varies says nothing; dividing by its rounding noise would blow it up.
    scale = np.where(deviation > 1e-6 * max(float(deviation.max()), 1e-12), deviation, np.inf)
    train, test = (train - mean) / scale, (test - mean) / scale
    # Keeps the penalty's meaning whatever the number of features.
    train, test = train / np.sqrt(train.shape[1]), test / np.sqrt(train.shape[1])
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    fold = _folds(np.arange(len(train)) if groups is None else groups, folds, seed)
    scores = np.zeros(len(PENALTIES))
    for k in range(folds):
        inside = (fold != k).astype(np.float32)
        for i, penalty in enumerate(PENALTIES):
            guess = _fit(train, train_labels, inside, penalty, classes)(train)
            scores[i] += np.sum((guess == train_labels) & (fold == k))
    penalty = PENALTIES[int(np.argmax(scores))]
    everything = np.ones(len(train), np.float32)
    predictions = _fit(train, train_labels, everything, penalty, classes)(test)
    return ProbeResult(float(np.mean(predictions == test_labels)), predictions, penalty)


def _folds(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """A fold number for each row, equal within a group."""
    unique, inverse = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(unique))
    return (order % folds)[inverse]


def _fit(x, labels, weight, penalty, classes):  # noqa: ANN001, ANN202
    """Fits on the rows of weight 1; returns features -> predicted classes."""
    w, b = _minimise(jnp.asarray(x), jnp.asarray(labels), jnp.asarray(weight), penalty, classes)
    w, b = np.asarray(w), np.asarray(b)
    return lambda rows: np.argmax(rows @ w + b, axis=1)


@functools.partial(jax.jit, static_argnums=4)
def _minimise(
    x: jax.Array, labels: jax.Array, weight: jax.Array, penalty: jax.Array, classes: int
) -> tuple[jax.Array, jax.Array]:
    """L-BFGS on the weighted mean log loss plus `penalty` times the squared norm."""

    def loss(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = x @ params[0] + params[1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        # The features were divided by sqrt(d), so weights are that much larger; 1 / d undoes it.
        norm = jnp.sum(params[0] ** 2) / x.shape[1]
        return jnp.sum(each * weight) / jnp.sum(weight) + penalty * norm

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    start = (jnp.zeros((x.shape[1], classes)), jnp.zeros(classes))
    (params, _), _ = jax.lax.scan(step, (start, solver.init(start)), length=ITERATIONS)
    return params
