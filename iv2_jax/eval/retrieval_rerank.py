"""The second pass of retrieval: the best candidates judged by fusion layers and matching head.

A pair is judged once, for both directions. Pairs are laid out by clip, `TEXTS_PER_CLIP` of its
texts at a time, because the keys and values of a clip's tokens, which are most of the work, are
then made once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from iv2_jax.errors import ConfigError, DataError
from iv2_jax.eval.retrieval_towers import EncodedMedia, EncodedTexts, Towers

TEXTS_PER_CLIP = 16
# What the original gives every pair that is not judged (spec stage2 9.1).
NOT_JUDGED = -100.0


@dataclass(frozen=True)
class Judged:
    """Logits of the pairs that were judged.

    Attributes:
      logits: (V, T) float32, NaN where a pair was not judged.
      v2t: bool (V, T), the best texts of each clip.
      t2v: bool (T, V), the best clips of each text.
    """

    logits: np.ndarray
    v2t: np.ndarray
    t2v: np.ndarray


def best(scores: np.ndarray, top: int) -> np.ndarray:
    """bool (N, M): the `top` best of each row, the earlier one first where scores are equal."""
    chosen = np.zeros(scores.shape, bool)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def judge(
    towers: Towers,
    media: EncodedMedia,
    texts: EncodedTexts,
    kind: str,
    v2t: np.ndarray,
    t2v: np.ndarray,
    *,
    top: int,
    pairs_per_batch: int = 256,
) -> Judged:
    """Judges the `top` best candidates of every query of both directions.

    Args:
      towers: The model.
      media: V clips with their tokens.
      texts: T texts with their hidden states.
      kind: Of media, such as `video`.
      v2t: (V, T) scores that candidates are chosen by.
      t2v: (T, V) likewise.
      top: Candidates of a query, or all if there are fewer.
      pairs_per_batch: Pairs in a batch over all devices.
    """
    if top < 1:
        raise ConfigError(f"rerank_top {top} must be at least 1")
    chosen = Judged(np.full(v2t.shape, np.nan, np.float32), best(v2t, top), best(t2v, top))
    texts_each = min(TEXTS_PER_CLIP, top, len(t2v))
    clips_each = towers.round_up(pairs_per_batch // texts_each)
    wanted = chosen.v2t | chosen.t2v.T
    for clips, columns in _batches(wanted, media.owner, clips_each, texts_each):
        mine = _own_rows(clips, media.owner)
        tokens = np.stack([media.tokens[int(media.index[c])] for c in clips[mine]])
        found = towers.match(tokens, texts.hidden[columns[mine]], texts.mask[columns[mine]], kind)
        # Padding repeats pairs that are judged anyway: writing them twice changes nothing.
        chosen.logits[clips[:, None], columns] = found
    return chosen


def _batches(
    wanted: np.ndarray, owner: np.ndarray, clips_each: int, texts_each: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of clips (G,) and their texts (G, Q) that cover the pairs `wanted` (V, T).

    Each process's clips stand where its rows of a global batch are.
    """
    processes = jax.process_count()
    share = clips_each // processes
    lists = [
        _slots(wanted, np.flatnonzero(owner == process), texts_each) for process in range(processes)
    ]
    idle = [process for process, (clips, _) in enumerate(lists) if not len(clips)]
    if idle:
        raise DataError(
            f"process {idle[0]} has no clip to rerank; take a smaller batch_size or fewer processes"
        )
    most = max(len(clips) for clips, _ in lists)
    for start in range(0, most, share):
        parts = [_rows(clips, columns, start, share) for clips, columns in lists]
        yield np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _slots(wanted: np.ndarray, clips: np.ndarray, texts_each: int) -> tuple[np.ndarray, np.ndarray]:
    """(S,) clips, each as often as its texts fill rows of (S, Q); short rows repeat a text."""
    rows, names = [], []
    for clip in clips:
        columns = np.flatnonzero(wanted[clip])
        short = -len(columns) % texts_each
        columns = np.concatenate([columns, np.repeat(columns[-1:], short)])
        rows.append(columns.reshape(-1, texts_each))
        names.append(np.full(len(rows[-1]), clip))
    empty = np.zeros(0, int), np.zeros((0, texts_each), int)
    return (np.concatenate(names), np.concatenate(rows)) if rows else empty


def _rows(
    clips: np.ndarray, columns: np.ndarray, start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` rows from `start` on, the last one repeated where there are no more."""
    at = np.minimum(np.arange(start, start + count), len(clips) - 1)
    return clips[at], columns[at]


def _own_rows(clips: np.ndarray, owner: np.ndarray) -> slice:
    """Which rows of a global batch this process puts in."""
    share = len(clips) // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def match_scores(
    logits: np.ndarray,
    judged: np.ndarray,
    cosines: np.ndarray,
    *,
    mix: float = 0.0,
    temperature: float = 1.0,
    released_fill: bool = False,
) -> np.ndarray:
    """Scores that rank one direction after the second pass.

    Args:
      logits: (N, M) of "belong together".
      judged: bool (N, M), the candidates of each query.
      cosines: (N, M) of the first pass.
      mix: Weight of `cosine / temperature` beside the logit. The original ranks by the logit
        alone, 0.
      temperature: Of the model.
      released_fill: Give all that were not judged the same score, -100, as the original. By
        default they follow the judged ones in the first pass's order; the recalls at up to as many
        as were judged are the same.

    Returns:
      (N, M) float32.
    """
    scores = logits + mix * cosines / temperature
    floor = NOT_JUDGED
    if not released_fill:
        floor = min(NOT_JUDGED, float(scores[judged].min()) - 3) + cosines
    return np.where(judged, scores, floor).astype(np.float32)
