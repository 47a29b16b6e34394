"""Statistics over questions: intervals of accuracies, paired tests, and clips that do not belong.

All draws come from seeds that the caller gives, so a figure can be computed again.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from iv2_jax.data.instruct.conversations import Medium
from iv2_jax.errors import DataError

_EXACT_GROUPS = 12  # 2 ** 12 sign flips are fewer than the draws that would stand for them
_CHUNK = 256  # draws at a time


class Asked(Protocol):
    """A dataclass that says what is asked about which clip and what is right."""

    text: str
    answer: str
    medium: Medium | None


Q = TypeVar("Q", bound=Asked)


@dataclasses.dataclass(frozen=True)
class PairedResult:
    """How the same questions are answered under two conditions.

    Attributes:
      own: mean of the first condition.
      other: mean of the second.
      difference: mean of first minus second.
      low: lower end of the difference's interval.
      high: upper end.
      p: two-sided, of the sign-flip permutation test that both conditions are exchangeable.
      questions: pairs.
      groups: what was resampled and flipped: groups of pairs, or pairs.
      better: pairs in which the first is greater.
      worse: pairs in which it is less.
      level: of the interval.
    """

    own: float
    other: float
    difference: float
    low: float
    high: float
    p: float
    questions: int
    groups: int
    better: int
    worse: int
    level: float = 0.95

    def __str__(self) -> str:
        return (
            f"{self.own:.4f} against {self.other:.4f}: difference {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}] at {self.level:.0%}, p = {self.p:.4g}, "
            f"{self.questions} questions in {self.groups} groups, {self.better} better, "
            f"{self.worse} worse"
        )


def paired(
    own: Sequence[float] | np.ndarray,
    other: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> PairedResult:
    """Compares two conditions question by question.

    The interval is the percentile bootstrap of the mean difference; p is that of a sign-flip
    permutation test: exact for few groups, else estimated from `draws` flips, the observed one
    counted among them, so it is never below 1 / (draws + 1). Questions about one clip depend on
    each other: name the clips as `groups` and whole clips are resampled and flipped.

    Args:
      own: `(N,)` values under the first condition: right or wrong as 1 or 0, or log-likelihoods.
      other: `(N,)` values of the same questions under the second.
      groups: `(N,)` group of each question; None: each is one.
      level: of the interval, between 0 and 1.
      draws: resamples, and permutations where they are drawn.
      seed: of the draws.

    Raises:
      DataError: there is no pair, lengths differ, or a value is not finite.
    """
    first, second = (np.asarray(values, np.float64) for values in (own, other))
    names = range(len(first)) if groups is None else groups
    if first.ndim != 1 or first.shape != second.shape or len(names) != len(first):
        raise DataError(
            f"own has shape {first.shape}, other {second.shape}, groups {len(names)} entries: "
            "one value of each is needed for every question"
        )
    if not len(first):
        raise DataError("there is no question to compare")
    for name, values in (("own", first), ("other", second)):
        if not np.isfinite(values).all():
            at = int(np.flatnonzero(~np.isfinite(values))[0])
            raise DataError(f"{name}[{at}] is {values[at]}: leave questions without a value out")
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    place = np.array([numbers[name] for name in names])
    difference = first - second
    sums = np.bincount(place, difference)
    sizes = np.bincount(place).astype(np.float64)
    rng = np.random.default_rng(seed)
    low, high = _bootstrap(sums, sizes, level, draws, rng)
    return PairedResult(
        own=float(first.mean()),
        other=float(second.mean()),
        difference=float(difference.mean()),
        low=low,
        high=high,
        p=_sign_flip(sums, draws, rng),
        questions=len(first),
        groups=len(sums),
        better=int((difference > 0).sum()),
        worse=int((difference < 0).sum()),
        level=level,
    )


def _bootstrap(
    sums: np.ndarray, sizes: np.ndarray, level: float, draws: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Percentile interval of the mean over resampled groups."""
    means = []
    for start in range(0, draws, _CHUNK):
        chosen = rng.integers(len(sums), size=(min(_CHUNK, draws - start), len(sums)))
        means.append(sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1))
    ends = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(ends[0]), float(ends[1])


def _sign_flip(sums: np.ndarray, draws: int, rng: np.random.Generator) -> float:
    """Share of sign flips whose sum is at least as far from 0 as the observed one."""
    count, observed = len(sums), abs(float(sums.sum()))
    slack = 1e-12 * max(float(np.abs(sums).sum()), 1e-300)  # sums in another order round otherwise
    if count <= _EXACT_GROUPS:
        bits = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        totals = np.abs((1.0 - 2.0 * bits) @ sums)
        return float((totals >= observed - slack).mean())
    extreme = 1
    for start in range(0, draws, _CHUNK):
        signs = rng.integers(2, size=(min(_CHUNK, draws - start), count)) * 2.0 - 1.0
        extreme += int((np.abs(signs @ sums) >= observed - slack).sum())
    return extreme / (draws + 1)


def wilson(right: int, total: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `total` questions; (0, 1) without any."""
    if not total:
        return 0.0, 1.0
    share, weight = right / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    # Rounding must not push the ends past what is known: all right is at most 1.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def mean_interval(
    tasks: Sequence[np.ndarray], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over tasks, questions resampled within each task."""
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for values in tasks:
        # A resample of right and wrong answers has a binomial number of right ones.
        means += rng.binomial(len(values), values.mean(), size=draws) / len(values)
    low, high = np.quantile(means / len(tasks), [0.025, 0.975])
    return float(low), float(high)


def swapped(questions: Sequence[Q], rng: np.random.Generator) -> list[Q]:
    """Gives every question the clip of another one, for a control of what is seen.

    A question gets, of the clips that are not its own and were given out least so far, a random
    one of the first of these kinds that there is:

    1. clips about which the same question is asked with another right answer (so that the answer
       is known to be wrong there);
    2. clips no question about which has this right answer;
    3. any other clip.

    Args:
      questions: dataclasses with `text`, `answer` and `medium`, all with a clip.
      rng: source of the draws.

    Returns:
      The questions with other clips, in the same order.

    Raises:
      DataError: a question has no clip, or all have the same.
    """
    media = [question.medium for question in questions]
    if None in media:
        raise DataError(f"question {media.index(None)} has no clip to swap")
    clips = list(dict.fromkeys(media))
    if len(clips) < 2:
        raise DataError(f"{len(questions)} questions about one clip: there is no other to show")
    answers: dict[Medium, set[str]] = collections.defaultdict(set)
    asked: dict[tuple[Medium, str], set[str]] = collections.defaultdict(set)
    for question, clip in zip(questions, media, strict=True):
        answers[clip].add(_same(question.answer))
        asked[clip, _same(question.text)].add(_same(question.answer))
    used = collections.Counter(dict.fromkeys(clips, 0))
    given: dict[int, Medium] = {}
    for at in rng.permutation(len(questions)).tolist():
        text, answer = _same(questions[at].text), _same(questions[at].answer)
        others = [clip for clip in clips if clip != media[at]]
        kinds = (
            [c for c in others if (c, text) in asked and answer not in asked[c, text]],
            [c for c in others if answer not in answers[c]],
            others,
        )
        best = next(kind for kind in kinds if kind)
        least = min(used[clip] for clip in best)
        pool = [clip for clip in best if used[clip] == least]
        given[at] = pool[int(rng.integers(len(pool)))]
        used[given[at]] += 1
    return [dataclasses.replace(q, medium=given[at]) for at, q in enumerate(questions)]


def _same(text: str) -> str:
    """What makes two questions or answers the same."""
    return " ".join(text.split()).strip(" .?!").casefold()
