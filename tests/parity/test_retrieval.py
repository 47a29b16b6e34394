"""Retrieval scores and recalls of the original's two evaluations."""

from __future__ import annotations

import re

import numpy as np
import pytest

from iv2_jax.eval import retrieval
from tests.parity.goldens import OUTPUT_LIMIT, assert_close


@pytest.fixture(scope="module")
def case(golden):
    return golden("retrieval")


@pytest.fixture(scope="module")
def scores(case):
    return retrieval.cosine_scores(case.inputs["video_feats"], case.inputs["text_feats"])


def test_scores(case, scores):
    ours = {
        "sim_v2t": scores,
        "sim_t2v": scores.T,
        "dsl_v2t": retrieval.dual_softmax(scores),
        "dsl_t2v": retrieval.dual_softmax(scores.T),
    }
    ours |= {f"s2_softmax_{name}": retrieval.softmax(value) for name, value in ours.items()}
    for kind in ("mean", "max"):
        frames = retrieval.cosine_scores(
            case.inputs["frames_v"], case.inputs["frames_t"], frames=kind
        )
        # This pair was recorded at a temperature that the file does not name.
        frames = frames * (case.outputs[f"get_sim_frames_{kind}_v2t"] / frames).mean()
        ours |= {f"get_sim_frames_{kind}_v2t": frames, f"get_sim_frames_{kind}_t2v": frames.T}
    for name in case.outputs:
        if match := re.fullmatch(r"mc_prob_temp(.+)", name):
            ours[name] = retrieval.choice_probabilities(
                case.inputs["mc_video"], case.inputs["mc_answers"], float(match[1])
            )
    assert set(ours) == set(case.outputs)
    for name, value in ours.items():
        assert_close(value, case.outputs[name], OUTPUT_LIMIT, name)


def test_recalls(case, scores):
    texts = case.inputs["text_to_video"]
    square = case.inputs["square_v2t"]
    pairs = {
        "metrics_sim": (scores, scores.T, texts),
        "metrics_dsl": (
            retrieval.dual_softmax(scores),
            retrieval.dual_softmax(scores.T),
            texts,
        ),
        "metrics_square": (square, case.inputs["square_t2v"], range(len(square))),
    }
    results = case.meta["results"]
    assert set(results) == set(pairs)
    for name, (v2t, t2v, item_of_text) in pairs.items():
        found = retrieval.retrieval_metrics(v2t, t2v, np.asarray(item_of_text))
        assert {k: round(v, 2) for k, v in found.items()} == results[name], name
