"""The Q-Former's pretraining: its model and losses in plain arrays, a run, and a chat after it."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError
from iv2_jax.interop import chat_towers
from iv2_jax.interop.sources import WeightSource, as_tensors
from iv2_jax.interop.torch_keys.text import bert_map
from iv2_jax.models import kinds, zoo
from iv2_jax.models.text.bert import BertConfig
from iv2_jax.objectives import matching
from iv2_jax.train import checkpoint, loop
from iv2_jax.train.bridge import BridgeTrainConfig
from iv2_jax.train.init_towers import TowerInit, assemble
from tests.data import multimodal
from tests.train import tiny_bridge as tiny
from tests.train.tiny_instruct import draw

CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def case():
    """Stage, parameters, a batch, the terms of it, and the model's parts in plain arrays."""
    stage = tiny.config().make_stage()
    params = draw(kinds.of(stage.config.model).abstract_params(stage.config.model))
    params["temp"] = np.float32(0.2)
    batch = tiny.batch()
    rng = jax.random.key(3)
    losses = jax.jit(lambda b: stage.loss_fn(params, {}, b, rng, train=False))
    pixels = stage.config.model.encoder.normalize(jnp.asarray(batch["video"]))
    context = stage.model.apply({"params": params}, pixels, method="encode")
    plain = tiny.Plain(params, stage.config.model, context)
    return stage, params, batch, rng, losses, plain


def _texts(batch):
    ids = batch["text_video"]
    told = ids.copy()
    told[:, 0] = tiny.START
    return ids, (ids > 0).astype(np.int32), told


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _features(case):
    """Unit features of queries (B, K, C) and captions (B, C)."""
    _, params, batch, *_, plain = case
    q, text, _ = plain.read(*_texts(batch))
    maps = [(q, params["vision_proj"]), (text[:, 0], params["text_proj"])]
    return [_unit(np.asarray(x @ p["kernel"] + p["bias"], np.float64)) for x, p in maps]


def _valid(batch):
    return (batch["text_video"] > 0).sum(axis=1) > 2


def test_contrast_is_the_mean_over_queries(case):
    _, params, batch, _, losses, _ = case
    queries, text = _features(case)
    ok = _valid(batch)
    assert 0 < ok.sum() < len(ok)
    scores = np.einsum("ikc,jc->ij", queries, text)[ok][:, ok] / queries.shape[1] / params["temp"]
    same = np.equal.outer(batch["match_id"][ok], batch["match_id"][ok])
    targets = same / same.sum(axis=1, keepdims=True)

    def entropy(s):
        return -(targets * (s - np.log(np.exp(s).sum(axis=1, keepdims=True)))).sum(axis=1).mean()

    want = (entropy(scores) + entropy(scores.T)) / 2
    total, found = losses(batch)
    np.testing.assert_allclose(found["loss_vtc"], want, **CLOSE)
    parts = sum(found[f"loss_{name}"] for name in ("vtc", "vtm", "cap"))
    np.testing.assert_allclose(total, parts, rtol=1e-6)


def test_matching_judges_three_pairs_a_row(case):
    """The drawn negatives are of other ids and of the row's group; logits and loss are plain."""
    stage, params, batch, rng, losses, plain = case
    queries, text = _features(case)
    reading = type("Reading", (), {"queries": jnp.asarray(queries), "text": jnp.asarray(text)})
    ok = _valid(batch)
    media, words = stage._negatives(
        reading, jnp.float32(params["temp"]), jnp.asarray(batch["match_id"]), jnp.asarray(ok), rng
    )
    ids, mask, _ = _texts(batch)
    start = np.arange(len(ids)) // 4 * 4
    wrong_media, wrong_text = (start + np.asarray(n.index) for n in (media, words))
    numbers = batch["match_id"]
    entropies = []
    for clip, caption, label in (
        (np.arange(len(ids)), np.arange(len(ids)), 1),
        (wrong_media, np.arange(len(ids)), 0),
        (np.arange(len(ids)), wrong_text, 0),
    ):
        assert label or (numbers[clip] != numbers[caption])[ok].all()
        own = tiny.Plain.__new__(tiny.Plain)
        own.params, own.config, own.context = plain.params, plain.config, plain.context[clip]
        q, t = own.joined(ids[caption], mask[caption])
        pair = np.concatenate([q.mean(axis=1), t[:, 0]], axis=1)
        logits = pair @ params["match_head"]["kernel"] + params["match_head"]["bias"]
        entropies.append(-jax.nn.log_softmax(logits)[ok, label])
    np.testing.assert_allclose(losses(batch)[1]["loss_vtm"], np.mean(entropies), **CLOSE)


def test_captions_are_told_word_by_word(case):
    """The smoothed loss of every word by those before it, and its gradient; empty rows left out."""
    stage, params, batch, _, losses, plain = case
    ids, mask, told = _texts(batch)
    hidden = plain.read(ids, mask, told)[2]
    head, word = params["lm_head"], params["bridge"]["embeddings"]["word"]
    x = jax.nn.gelu(hidden @ head["fc"]["kernel"] + head["fc"]["bias"], approximate=False)
    logits = plain._norm(head["norm"], x) @ word.T + head["bias"]
    shares = np.asarray(jax.nn.log_softmax(logits), np.float64)[:, :-1]
    labels = ids[:, 1:]
    counts = (labels > 0) & _valid(batch)[:, None]
    own = np.take_along_axis(shares, labels[..., None].astype(int), axis=-1)[..., 0]
    want = -(0.9 * own + 0.1 * shares.mean(axis=-1))[counts].mean()
    np.testing.assert_allclose(losses(batch)[1]["loss_cap"], want, **CLOSE)

    def of_bias(bias):
        changed = {**params, "lm_head": {**head, "bias": bias}}
        return stage._captions(changed, hidden, jnp.asarray(ids), _valid(batch))["loss_cap"]

    target = 0.9 * np.eye(tiny.VOCAB)[labels] + 0.1 / tiny.VOCAB
    gradient = (np.exp(shares) - target)[counts].sum(axis=0) / counts.sum()
    np.testing.assert_allclose(jax.grad(of_bias)(head["bias"]), gradient, **CLOSE)


def test_captions_see_the_clip_and_nothing_to_come(case):
    stage, params, batch, _, _, _ = case
    ids, mask, told = _texts(batch)
    pixels = stage.config.model.encoder.normalize(jnp.asarray(batch["video"]))
    context = stage.model.apply({"params": params}, pixels, method="encode")

    @jax.jit
    def read(context, ids, mask, told):
        return stage.model.apply({"params": params}, context, ids, mask, told, method="read")

    first = read(context, ids, mask, told)
    later = told.copy()
    later[:, 2] = 7 + (later[:, 2] == 7)
    other = read(context, ids, mask, later)
    np.testing.assert_array_equal(first.caption[:, :2], other.caption[:, :2])
    assert np.abs(first.caption[:, 2] - other.caption[:, 2]).max() > 1e-3
    # Neither what is told nor what is read reaches the queries; padding reaches nothing.
    np.testing.assert_array_equal(first.queries, other.queries)
    np.testing.assert_array_equal(first.text, other.text)
    padded = np.where(mask > 0, ids, 9)
    other = read(context, padded, mask, np.where(mask > 0, told, 9))
    np.testing.assert_array_equal(first.text, other.text)
    np.testing.assert_array_equal(
        np.asarray(first.caption)[mask > 0], np.asarray(other.caption)[mask > 0]
    )
    other = read(context[::-1], ids, mask, told)
    assert np.abs(first.caption - other.caption).max() > 1e-3
    np.testing.assert_array_equal(first.text, other.text)


def test_floor_leaves_something_to_every_negative():
    """With the true pair taking all of the softmax, the others are equally likely."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(6, 16)).astype(np.float32)

    @jax.vmap
    def draw_all(key):
        ids = jnp.arange(6)
        return matching.mine_negatives(key, text, text[:, None], 0.01, ids, floor=1e-4).index

    seen = np.zeros((6, 6), int)
    for index in draw_all(jax.random.split(jax.random.key(0), 40)):
        seen[np.arange(6), index] += 1
    assert (np.diag(seen) == 0).all()
    assert (seen + np.eye(6, dtype=int) > 0).all()


def test_a_run_and_a_chat_after_it(tmp_path):
    """Losses fall, the encoder stays; a chat model takes the Q-Former, and a run goes on."""
    model = tiny.model()
    listed = multimodal.write_lists(tmp_path)["video"]
    options = {"vocab_size": None, "trailing_sep": True}
    video = dataclasses.replace(
        listed,
        size=model.encoder.image_size,
        num_frames=model.encoder.num_frames,
        text=dataclasses.replace(listed.text, options=options, captions=("video",)),
    )
    values = tiny.values(model, batch_size=4, steps=6) | {
        "data": {"media": {"video": config_lib.to_dict(video)}},
    }
    folder = tmp_path / "run"
    assert loop.train(config_lib.build(BridgeTrainConfig, values), folder).reason == "complete"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert len(steps) == 6
    assert all(np.isfinite(line["loss"]) for line in steps)
    assert steps[-1]["loss_cap"] < steps[0]["loss_cap"]
    params = _flat(checkpoint.load_params(folder)[0])
    chat = zoo.get("test_tiny_chat")
    chat = dataclasses.replace(
        chat, bridge=dataclasses.replace(chat.bridge, depth=2, vocab_size=tiny.VOCAB)
    )
    taken = _flat(assemble([TowerInit("bridge", str(folder))], chat).params)
    assert set(taken) == {path for path in params if path.startswith("bridge/")}
    wanted = {p for p in _flat(kinds.of(chat).abstract_params(chat)) if p.startswith("bridge/")}
    left = {path.split("/")[1] for path in wanted - set(taken)}
    assert left == {"project_up", "project_down", "extra_query_tokens"}
    whole = _flat(assemble([TowerInit("model", str(folder))], model).params)
    assert set(whole) == set(params)
    for path, value in (whole | taken).items():
        np.testing.assert_array_equal(value, params[path])


def test_frozen_encoder_drops_nothing_and_the_rest_does():
    """Traced alone: dropout is most of what a compiler works on."""
    for freeze, drops in (["encoder/.*"], False), ([], True):
        changes = {"bridge_pretraining": config_lib.to_dict(tiny.model(drop=0.1))}
        changes["optimizer"] = {"freeze": freeze}
        stage = tiny.config(**changes).make_stage()
        assert stage._encoder_drops is drops
    params = kinds.of(stage.config.model).abstract_params(stage.config.model)
    loss, found = jax.eval_shape(
        lambda p, b: stage.loss_fn(p, {}, b, jax.random.key(0), train=True), params, tiny.batch()
    )
    assert loss.shape == ()
    assert {"loss_vtc", "loss_vtm", "loss_cap", "temperature"} < set(found)


def _flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_starts_as_bert(tmp_path):
    """Text, the queries' feed-forward and the language head; of [DEC] BERT knows nothing."""
    model = tiny.model()
    c = model.bridge
    bert = BertConfig(
        vocab_size=c.vocab_size - 1,
        width=c.width,
        num_heads=c.num_heads,
        mlp_width=c.mlp_width,
        max_length=c.max_length,
        context_width=c.width,
        depth=c.depth,
        fusion_layer=c.depth,
    )
    params = draw(kinds.of(bert).abstract_params(bert))
    tensors = {
        name.removeprefix("bert."): x for name, x in as_tensors(params, bert_map(bert)).items()
    }
    taken = chat_towers.bridge_to_pretrain(WeightSource(tmp_path, tensors), model).params
    bridge = _flat(kinds.of(model).abstract_params(model))
    assert all(bridge[path].shape == x.shape for path, x in taken.items())
    np.testing.assert_array_equal(
        taken["bridge/embeddings/word"][:-1], params["embeddings"]["word"]
    )
    layer = "bridge/groups/layer_0"
    np.testing.assert_array_equal(
        taken[f"{layer}/mlp_query/fc1/kernel"], taken[f"{layer}/mlp/fc1/kernel"]
    )
    head = params["head"]
    np.testing.assert_array_equal(taken["lm_head/fc/kernel"], head["fc"]["kernel"])
    np.testing.assert_array_equal(taken["lm_head/bias"], [*head["bias"], 0])
    fresh = {path for path in bridge if path not in taken and not path.startswith("encoder/")}
    parts = ("vision_proj", "text_proj", "match_head", "temp", "query_tokens", "vision_norm")
    assert all("cross_attn" in path or any(part in path for part in parts) for path in fresh)


def test_what_does_not_fit_is_named():
    for changes, message in (
        ({"loss": {"start_id": tiny.VOCAB}}, r"loss\.start_id=128 is not below"),
        ({"loss": {"start_id": 5, "weights": {"itm": 1.0}}}, r"no term 'itm'"),
        ({"loss": {"start_id": 5}, "retrieval": {"enabled": True}}, r"retrieval\.enabled"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.config(**changes)
    chat = zoo.get("test_tiny_chat")
    other = dataclasses.replace(chat.bridge, text=False)
    with pytest.raises(ConfigError, match=r"bridge\.text=False"):
        dataclasses.replace(tiny.model(), bridge=other)
