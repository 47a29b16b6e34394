"""Dialogue model: slots, views, padding, images, the released first position, generation."""

from __future__ import annotations

import dataclasses
import functools
from functools import partial

import jax
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from iv2_jax.data import dialogue as dlg
from iv2_jax.data import tiles
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn
from iv2_jax.data.instruct.sequence import SequenceBuilder, SequenceConfig
from iv2_jax.errors import ConfigError
from iv2_jax.models import chat as chat_lib
from iv2_jax.models.chat import Chat, generate_answers
from iv2_jax.models.decoding import GenerationConfig
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.streaming import stream_answers
from iv2_jax.objectives.next_token import next_token_loss
from tests.data.instruct.words import Words

TINY = chat_lib.ZOO["test_tiny_chat"]
COUNT = TINY.bridge.num_tokens
BUILDER = SequenceBuilder(SequenceConfig(tokens_per_view=COUNT), Words())


def _batch(*views, length=32, train=True, left=False):
    """Rows of conversations with so many views each."""
    examples = []
    for index, count in enumerate(views):
        turn = Turn("what " * (index + 1), "a dog" if train else None)
        examples.append(BUILDER.build(Conversation((turn,), (Medium("video", "a.mp4"),)), [count]))
    return dlg.pad_batch(examples, length, 0, left=left)


def _video(batch=2, views=1, frames=2, seed=0):
    shape = (batch, views, frames, 28, 28, 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    """Random parameters; only the shapes are the initialiser's, which saves compiling it."""
    batch, rng = _batch(1, 1), np.random.default_rng(0)
    inputs = (batch["tokens"], batch["visual_index"])
    tree = jax.eval_shape(partial(Chat(TINY).init, video=_video()), jax.random.key(0), *inputs)
    return jax.tree.map(
        lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype("f4"), meta.unbox(tree)
    )


@functools.cache
def _apply(config):
    return jax.jit(Chat(config).apply)


@functools.cache
def _visual_tokens():
    return jax.jit(partial(Chat(TINY).apply, method="visual_tokens"))


def _run(params, batch, config=TINY, **inputs):
    return _apply(config)(params, batch["tokens"], batch["visual_index"], batch["mask"], **inputs)


def test_visual_tokens_stand_in_their_slots_and_text_beside(params):
    batch = _batch(1, 1)
    out = _run(params, batch, video=_video())
    table = params["params"]["llm"]["embed"]["embedding"]
    for row in range(2):
        slots = np.flatnonzero(batch["visual_index"][row] >= 0)
        np.testing.assert_array_equal(out.embeddings[row, slots], out.visual[row])
        text = np.flatnonzero(batch["visual_index"][row] < 0)
        np.testing.assert_array_equal(out.embeddings[row, text], table[batch["tokens"][row, text]])
    assert out.logits.shape == (2, 32, TINY.llm.vocab_size)
    assert not np.isnan(out.logits).any()


def test_a_shorter_row_or_another_sample_changes_nothing(params):
    batch, video = _batch(1, 1), _video()
    out = _run(params, batch, video=video)
    one = {name: value[1:, :20] for name, value in batch.items()}
    alone = _run(params, one, video=video[1:])
    real = one["mask"][0]
    assert 10 < real.sum() < 20
    np.testing.assert_allclose(alone.logits[0, real], out.logits[1, :20][real], atol=2e-5)


def test_the_prompt_is_causal_and_ids_at_slots_mean_nothing(params):
    batch, video = _batch(1, 1), _video()
    out = _run(params, batch, video=video)
    last = int(batch["mask"][0].sum()) - 1
    changed = {name: value.copy() for name, value in batch.items()}
    changed["tokens"][0, last] = 7
    changed["tokens"][changed["visual_index"] >= 0] = 9
    again = _run(params, changed, video=video)
    np.testing.assert_array_equal(again.logits[0, :last], out.logits[0, :last])
    assert np.abs(again.logits[0, last] - out.logits[0, last]).max() > 1e-4


def test_views_are_encoded_alone_and_read_in_order(params):
    video = _video(1, 2)
    together = _visual_tokens()(params, video)
    turned = _visual_tokens()(params, video[:, ::-1])
    np.testing.assert_allclose(turned[:, COUNT:], together[:, :COUNT], atol=1e-5)
    np.testing.assert_allclose(turned[:, :COUNT], together[:, COUNT:], atol=1e-5)
    assert np.abs(together[:, :COUNT] - together[:, COUNT:]).max() > 1e-3


def test_high_definition_views_and_samples_with_fewer(params):
    frames = np.random.default_rng(0).integers(0, 256, (2, 50, 90, 3)).astype(np.uint8)
    views = tiles.hd_views(frames, tiles.TilingConfig(tile_size=28))
    assert len(views) == 3
    video = np.stack([np.asarray(TINY.encoder.normalize(views))] * 2)
    batch = _batch(3, 1)
    assert (batch["visual_index"] >= 0).sum(1).tolist() == [3 * COUNT, COUNT]
    out = _run(params, batch, video=video)
    assert out.visual.shape == (2, 3 * COUNT, 32)
    # The second sample has one view; what fills it up is named by no slot.
    video[1, 1:] = 5.0
    np.testing.assert_array_equal(_run(params, batch, video=video).logits, out.logits)


def test_an_image_is_one_frame_with_positions_of_its_own(params):
    encoder = params["params"]["encoder"]
    noise = np.random.default_rng(1).normal(size=encoder["img_pos_embed"].shape)
    encoder = encoder | {"img_pos_embed": encoder["img_pos_embed"] + noise.astype("f4")}
    moved = {"params": params["params"] | {"encoder": encoder}}
    image, video = _video(1, frames=1), _video(1, 2)
    seen = [_visual_tokens()(tree, image) for tree in (params, moved)]
    assert seen[0].shape == (1, COUNT, 32)
    assert np.abs(seen[0] - seen[1]).max() > 1e-3
    seen = [_visual_tokens()(tree, video) for tree in (params, moved)]
    np.testing.assert_array_equal(seen[0], seen[1])


def test_the_task_is_told_to_the_bridge_with_every_view(params):
    told = {"bridge_ids": np.array([[3, 4, 0]]), "bridge_mask": np.array([[1, 1, 0]])}
    video = np.repeat(_video(1), 2, axis=1)
    out = _visual_tokens()(params, video, **told)
    np.testing.assert_allclose(out[:, :COUNT], out[:, COUNT:], atol=1e-5)
    assert np.abs(out - _visual_tokens()(params, video)).max() > 1e-3


def test_text_alone_and_slots_that_name_nothing(params):
    batch = _batch(1, 1)
    embed = partial(Chat(TINY).apply, params, batch["tokens"], method="embed")
    assert np.isnan(embed(batch["visual_index"], None)).any()
    index = np.full_like(batch["visual_index"], -1)
    assert not np.isnan(embed(index, None)).any()
    index[0, 5] = COUNT  # one past the last visual token
    assert np.isnan(embed(index, np.zeros((2, COUNT, 32), np.float32))[0, 5]).all()
    out = Chat(TINY).apply(params, batch["tokens"][:, :4], index[:, :4])
    assert out.visual is None
    assert out.logits.shape == (2, 4, TINY.llm.vocab_size)


def test_released_first_position_is_a_number(params):
    batch = _batch(1, 1)
    wrong, right = (
        Chat(dataclasses.replace(TINY, bos_as_number=flag)).apply(
            params,
            batch["tokens"],
            batch["visual_index"],
            np.zeros((2, COUNT, 32), np.float32),
            method="embed",
        )
        for flag in (True, False)
    )
    np.testing.assert_array_equal(wrong[:, 0], np.ones((2, 32)))
    np.testing.assert_array_equal(wrong[:, 1:], right[:, 1:])
    table = params["params"]["llm"]["embed"]["embedding"]
    np.testing.assert_array_equal(right[:, 0], table[[1, 1]])


def test_generation_continues_as_the_whole_model_would(params):
    video, steps = _video(), 4
    batch = _batch(1, 1, length=20, train=False, left=True)
    made = generate_answers(
        Chat(TINY),
        params["params"],
        GenerationConfig(max_new_tokens=steps, eos_ids=()),
        batch["tokens"],
        batch["visual_index"],
        batch["mask"],
        video=video,
    )
    streamed = stream_answers(
        Chat(TINY),
        params["params"],
        GenerationConfig(max_new_tokens=steps, eos_ids=()),
        batch["tokens"],
        batch["visual_index"],
        batch["mask"],
        video=video,
    )
    found = [sum(rows, []) for rows in zip(*streamed, strict=True)]  # noqa: RUF017 (four tokens)
    assert found == np.asarray(made.tokens).tolist()
    # The whole sequence at once, padded on the right: every new token is the best there.
    real = batch["mask"].sum(1)
    whole = _batch(1, 1, train=False)
    for row in range(2):
        place = slice(real[row], real[row] + steps)
        whole["tokens"][row, place] = made.tokens[row]
        whole["mask"][row, place] = True
    best = _run(params, whole, video=video).logits.argmax(-1)
    for row in range(2):
        expected = best[row, real[row] - 1 : real[row] - 1 + steps]
        assert made.tokens[row].tolist() == expected.tolist()


@pytest.mark.slow
def test_a_training_step_reaches_every_part(params):
    llm = TINY.llm.with_lora(LoraConfig(2, 4.0, dropout=0.1), head=True)
    config = dataclasses.replace(
        TINY,
        encoder=dataclasses.replace(TINY.encoder, drop_path_rate=0.1),
        bridge=dataclasses.replace(TINY.bridge, depth=2, drop_path_rate=0.1),
        llm=llm,
    )
    batch, rng = _batch(1, 1), np.random.default_rng(0)
    inputs = batch["tokens"], batch["visual_index"], batch["mask"]
    init = partial(Chat(config).init, video=_video())
    tree = meta.unbox(jax.eval_shape(init, jax.random.key(0), *inputs))
    tree = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype("f4"), tree)

    @jax.jit
    def gradient(tree, video):
        def loss_fn(tree):
            # Another generator than the default one, whose code takes XLA long to compile.
            keys = jax.random.split(jax.random.key(1, impl="rbg"))
            rngs = {"dropout": keys[0], "droppath": keys[1]}
            out = Chat(config).apply(tree, *inputs, video=video, train=True, rngs=rngs)
            return next_token_loss(out.logits, batch["targets"])[0]

        return jax.grad(loss_fn)(tree)

    flat = traverse_util.flatten_dict(gradient(tree, _video())["params"], sep="/")
    assert all(np.isfinite(value).all() for value in flat.values())
    still = {path for path, value in flat.items() if not np.abs(value).max() > 0}
    # Never applied, of images alone, or of text that the bridge was not given.
    expected = {path for path in flat if "project_down" in path or "img_pos" in path}
    expected |= {path for path in flat if path.startswith("bridge/") and "/mlp/" in path}
    expected |= {"bridge/embeddings/word", "bridge/embeddings/position"}
    # A key's bias moves all scores of a query alike: its gradient is nothing but rounding.
    assert {path for path in still if not path.endswith("/k/bias")} == {
        path for path in expected if not path.endswith("/k/bias")
    }


def test_misfits_are_refused(params):
    with pytest.raises(ConfigError, match=r"bridge\.context_width=24"):
        dataclasses.replace(TINY, bridge=dataclasses.replace(TINY.bridge, context_width=24))
    with pytest.raises(ConfigError, match=r"llm\.decoder\.width=32"):
        dataclasses.replace(TINY, bridge=dataclasses.replace(TINY.bridge, llm_width=16))
    with pytest.raises(ConfigError, match=r"encoder\.pool=True"):
        dataclasses.replace(TINY, encoder=dataclasses.replace(TINY.encoder, pool=True))
    with pytest.raises(ConfigError, match="either video or features"):
        Chat(TINY).apply(params, method="visual_tokens")
    with pytest.raises(ConfigError, match="encoder=None"):
        Chat(dataclasses.replace(TINY, encoder=None)).apply(
            params, _video(), method="visual_tokens"
        )
    with pytest.raises(ConfigError, match="video has shape"):
        Chat(TINY).apply(params, _video()[0, 0], method="visual_tokens")
