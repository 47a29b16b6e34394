"""Retrieval of tiny models over real clips: against brute force, on meshes, with odd data."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.data.pipeline import make_loader
from iv2_jax.data.row_texts import load_tokenizer
from iv2_jax.errors import ConfigError, DataError
from iv2_jax.eval import retrieval, retrieval_rerank, retrieval_towers
from iv2_jax.eval.retrieval_task import RetrievalOptions, evaluate_retrieval
from iv2_jax.models import clip, stage2
from iv2_jax.models.stage2 import Stage2
from iv2_jax.parallel.mesh import MeshConfig, make_mesh
from tests.eval import two_towers

VISUAL = stage2.ZOO["test_tiny_stage2"]
AUDIOVISUAL = stage2.ZOO["test_tiny_stage2_audiovisual"]
# Captions of `two_towers`, cleaned; "a cat sleeps" is that of two clips.
TEXTS = (
    "a red ball",
    "a cat sleeps",
    "two cat runs",
    "a dog jumps",
    "blue man runs",
    "two dog sleeps",
    "a man is blue",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return two_towers.write_set(tmp_path_factory.mktemp("set")).parent


@pytest.fixture(scope="module")
def params():
    return two_towers.params_of(VISUAL)


@pytest.fixture(scope="module")
def reference(folder, params):
    """Cosines and logits of all pairs, one model call for each pair's parts."""
    data = two_towers.data_config(folder)
    with make_loader(data, seed=0, global_batch=1) as loader:
        video = np.concatenate([batch["video"] for batch in loader])
    ids, mask = load_tokenizer(data.text).encode_batch(TEXTS)

    @jax.jit
    def run(params):
        def method(model):
            vision = model.encode_vision(VISUAL.vision.encoder.normalize(jnp.asarray(video)))
            text = model.encode_text(ids, mask)
            rows, columns = np.divmod(np.arange(len(video) * len(ids)), len(ids))
            fused = model.fuse(vision.tokens[rows], text.hidden[columns], mask[columns])
            return vision.joint, text.joint, model.match_logits(fused)[:, 1]

        return Stage2(VISUAL).apply({"params": params}, method=method)

    vision, text, logits = jax.device_get(run(params))
    return retrieval.cosine_scores(vision, text), logits.reshape(len(video), len(ids))


def test_all_pairs_equal_brute_force(folder, params, reference):
    result = evaluate_retrieval(
        params, VISUAL, two_towers.data_config(folder), rerank_top=100, batch_size=4
    )
    cosines, logits = reference
    assert result.texts == TEXTS
    assert [clip.id for clip in result.clips] == [f"c{i}" for i in range(6)]
    np.testing.assert_allclose(result.scores, cosines, atol=1e-5)
    np.testing.assert_allclose(result.match["v2t"], logits, atol=1e-5)
    np.testing.assert_allclose(result.match["t2v"], logits.T, atol=1e-5)
    relevant = np.zeros((6, 7), bool)
    relevant[[0, 1, 1, 2, 3, 4, 5, 5], [0, 1, 2, 3, 1, 4, 5, 6]] = True
    np.testing.assert_array_equal(result.relevant, relevant)
    counts = np.array([1, 2, 1, 1, 1, 1, 1])
    for kind, scores in {"sim": cosines, "match": logits}.items():
        expected = retrieval.ranking_metrics(scores, scores.T, relevant, counts)
        for name, value in expected.items():
            assert result.metrics[f"{kind}/{name}"] == pytest.approx(value), (kind, name)
    # Two clips have the commonest caption: 2 of 8 queries have 2 right ones of 6.
    assert result.metrics["chance/t2v_r1"] == pytest.approx(100 * (6 / 6 + 2 * 2 / 6) / 8)
    assert (result.metrics["clips"], result.metrics["captions"]) == (6, 8)


def test_only_the_best_are_judged(folder, params, reference):
    cosines, logits = reference
    result = evaluate_retrieval(
        params, VISUAL, two_towers.data_config(folder), rerank_top=2, batch_size=4
    )
    for way, first, second in (("v2t", cosines, logits), ("t2v", cosines.T, logits.T)):
        top = retrieval_rerank.best(first, 2)
        assert (top.sum(1) == 2).all()
        found = result.match[way]
        np.testing.assert_allclose(found[top], second[top], atol=1e-5)
        # The others follow in the first pass's order.
        others = np.where(top, -np.inf, found)
        wanted = np.where(top, -np.inf, first)
        np.testing.assert_array_equal(others.argmax(1), wanted.argmax(1))
        assert np.where(top, np.inf, found).max() == np.inf
        assert found[~top].max() < found[top].min()


def test_options_of_the_second_pass(folder, params, reference):
    cosines, logits = reference
    options = RetrievalOptions(
        mix=0.5, rerank_by="dsl", released_fill=True, pairs_per_batch=2, same_text_relevant=False
    )
    result = evaluate_retrieval(
        params, VISUAL, two_towers.data_config(folder), rerank_top=3, batch_size=4, options=options
    )
    assert len(result.texts) == 8  # equal captions stay apart
    assert result.relevant.sum() == 8
    assert (result.counts == 1).all()
    columns = [TEXTS.index(text) for text in result.texts]
    cosines, logits = cosines[:, columns], logits[:, columns]
    top = retrieval_rerank.best(retrieval.dual_softmax(cosines), 3)
    expected = np.where(top, logits + 0.5 * cosines / 0.07, -100)
    np.testing.assert_allclose(result.match["v2t"], expected, atol=2e-4)


def test_a_mesh_gives_the_same_without_silent_transfers_or_a_second_compilation(folder, params):
    data = two_towers.data_config(folder)
    alone = evaluate_retrieval(params, VISUAL, data, rerank_top=3)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    towers = retrieval_towers.Towers(params, VISUAL, mesh)
    placed = towers._params
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(placed))
    counted = []
    for _ in range(2):
        with jax.transfer_guard("disallow"):
            result = evaluate_retrieval(placed, VISUAL, data, rerank_top=3, mesh=mesh)
        steps = (
            retrieval_towers._media_step(VISUAL, "video", 1, True, mesh),
            retrieval_towers._text_step(VISUAL, True, mesh),
            retrieval_towers._match_step(VISUAL, "video", mesh),
        )
        counted.append([step._cache_size() for step in steps])
        np.testing.assert_allclose(result.scores, alone.scores, atol=1e-5)
        np.testing.assert_allclose(result.match["t2v"], alone.match["t2v"], atol=1e-5)
    assert counted == [[1, 1, 1], [1, 1, 1]]


def test_clips_that_cannot_take_part_are_left_out_and_named(tmp_path, params, caplog):
    captions = [*two_towers.CAPTIONS[:4], ("...",), ()]
    two_towers.write_set(tmp_path, captions)
    (tmp_path / "clip1.mp4").write_bytes(b"no video")
    result = evaluate_retrieval(params, VISUAL, two_towers.data_config(tmp_path), rerank_top=2)
    assert [clip.id for clip in result.clips] == ["c0", "c2", "c3"]
    assert result.left_out == {"does not decode": ["c1"], "no caption": ["c4", "c5"]}
    assert result.metrics["left_out"] == 3
    assert "does not decode (c1)" in caplog.text
    for i in (0, 2, 3):
        (tmp_path / f"clip{i}.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="no clip left"):
        evaluate_retrieval(params, VISUAL, two_towers.data_config(tmp_path))


def test_paragraphs_and_first_captions(folder, params):
    for choice, texts in (("join", "a cat sleeps two cat runs"), ("first", "a cat sleeps")):
        text = two_towers.text_config(folder, choice=choice)
        result = evaluate_retrieval(params, VISUAL, two_towers.data_config(folder, text=text))
        assert result.texts[1] == texts
        assert result.counts.sum() == 6


@pytest.mark.parametrize("name", ["test_tiny_clip", "test_tiny_clip_small"])
def test_clip_models(folder, name):
    config = clip.ZOO[name]
    params = two_towers.params_of(config)
    text = two_towers.text_config(folder)
    if name.endswith("small"):
        text = dataclasses.replace(text, max_length=config.text.context_length)
    result = evaluate_retrieval(params, config, two_towers.data_config(folder, text=text))
    assert result.scores.shape == (6, 7)
    assert np.unique(result.scores.round(6)).size > 30  # neither clips nor texts are all alike
    assert "dsl/t2v_r1" in result.metrics
    assert result.match is None
    with pytest.raises(ConfigError, match="CLIP has none"):
        evaluate_retrieval(params, config, two_towers.data_config(folder), rerank_top=4)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    two_towers.write_set(folder, audio=True)
    two_towers.write_set(folder / "silent", two_towers.CAPTIONS[:1])
    (folder / "silent" / "clip0.mp4").rename(folder / "clip4.mp4")
    return folder


@pytest.mark.parametrize("media", ["audio", "audio_video"])
def test_sound(sounds, media):
    params = two_towers.params_of(AUDIOVISUAL)
    data = two_towers.data_config(sounds, media=media, audio=two_towers.audio_config())
    result = evaluate_retrieval(params, AUDIOVISUAL, data, rerank_top=2)
    why = "no sound that decodes" if media == "audio" else "no usable sound"
    assert result.left_out == {why: ["c4"]}
    assert result.scores.shape == (5, 6)
    differs = np.ptp(result.scores, axis=0).max()
    # All clips have one tone: sound alone cannot tell them apart, its fusion with pictures can.
    assert differs < 1e-3 if media == "audio" else differs > 1e-3


def test_what_a_model_cannot_do_is_refused(folder, params):
    data = two_towers.data_config(folder)
    cases = (
        (VISUAL, dataclasses.replace(data, text=None), 0, "data.text"),
        (VISUAL, dataclasses.replace(data, views=2), 0, "one view"),
        (VISUAL, two_towers.data_config(folder, media="text"), 0, "retrieval takes video"),
        (
            VISUAL,
            two_towers.data_config(folder, media="audio", audio=two_towers.audio_config()),
            0,
            "audio=None",
        ),
        (
            dataclasses.replace(AUDIOVISUAL, audio_matching=False),
            two_towers.data_config(folder, media="audio", audio=two_towers.audio_config()),
            2,
            "audio_matching=True",
        ),
        (VISUAL.text, data, 0, "stage-2 or CLIP model"),
    )
    for config, given, top, message in cases:
        with pytest.raises(ConfigError, match=message):
            evaluate_retrieval(params, config, given, rerank_top=top)
    with pytest.raises(ConfigError, match="is not among data"):
        evaluate_retrieval(params, VISUAL, data, options=RetrievalOptions(caption="speech"))


def test_batches_of_pairs_cover_exactly_what_is_wanted():
    rng = np.random.default_rng(0)
    wanted = rng.random((7, 11)) < 0.3
    wanted[:, 0] = True
    seen = np.zeros_like(wanted)
    shapes = set()
    for clips, columns in retrieval_rerank._batches(wanted, np.zeros(7, int), 3, 4):
        shapes.add((clips.shape, columns.shape))
        seen[clips[:, None], columns] = True
    np.testing.assert_array_equal(seen, wanted)
    assert shapes == {((3,), (3, 4))}


def test_batches_of_pairs_on_two_processes(monkeypatch):
    """Each process's clips stand in its part of every batch, and all are covered."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    rng = np.random.default_rng(1)
    wanted = rng.random((6, 5)) < 0.5
    wanted[:, 2] = True
    owner = np.array([0, 0, 0, 0, 1, 1])
    seen = np.zeros_like(wanted)
    for clips, columns in itertools.islice(retrieval_rerank._batches(wanted, owner, 4, 2), 50):
        assert (owner[clips[:2]] == 0).all()
        assert (owner[clips[2:]] == 1).all()
        seen[clips[:, None], columns] = True
    np.testing.assert_array_equal(seen, wanted)
    with pytest.raises(DataError, match="process 1 has no clip"):
        list(retrieval_rerank._batches(wanted, np.zeros(6, int), 4, 2))
