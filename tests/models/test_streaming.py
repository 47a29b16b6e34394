"""Streaming against `generate`, and rows that know nothing of the batch they stand in."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from iv2_jax.errors import ConfigError, DataError
from iv2_jax.models import one_path, streaming
from iv2_jax.models.decoding import unstacked
from iv2_jax.models.generate import GenerationConfig, generate
from iv2_jax.models.llm import Llm
from iv2_jax.models.streaming import stream
from tests.models import tiny_llm

CONFIG = tiny_llm.config()
MODEL = Llm(CONFIG)
PARAMS = tiny_llm.params(CONFIG)
PROMPT = tiny_llm.tokens(3, 5, seed=4)
SETTINGS = {
    "greedy": GenerationConfig(max_new_tokens=9, eos_ids=(6, 9), pad_id=22),
    "sampled": GenerationConfig(
        max_new_tokens=9, eos_ids=(3, 7, 11), pad_id=22, do_sample=True, temperature=2.0, top_p=0.9
    ),
    "edited": GenerationConfig(
        max_new_tokens=9,
        eos_ids=(3, 7, 12),
        stop_sequences=((5, 6), (9,)),
        min_new_tokens=3,
        repetition_penalty=1.5,
    ),
}


def _rows(out):
    """The tokens of each row, without padding."""
    pairs = zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)
    return [row[:length].tolist() for row, length in pairs]


def _streamed(settings, chunk, **prompt):
    """All of a stream: its steps, and the rows they make."""
    steps = list(stream(MODEL, PARAMS, settings, chunk=chunk, **prompt))
    return steps, [[t for step in steps for t in step[row]] for row in range(len(steps[0]))]


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_stream_is_generate_token_by_token(name, chunk):
    rng = jax.random.key(5)
    mask = np.ones(PROMPT.shape, bool)
    mask[1, :2] = False
    prompt = {"tokens": PROMPT, "mask": mask, "rng": rng}
    wanted = _rows(generate(MODEL, PARAMS, SETTINGS[name], **prompt))
    steps, rows = _streamed(SETTINGS[name], chunk, **prompt)
    assert rows == wanted
    assert len({len(row) for row in rows}) > 1  # some end early
    assert [len(row) for row in steps[0]] == [1, 1, 1]
    assert max(len(row) for step in steps[1:] for row in step) <= chunk
    assert any(steps[-1])  # no step without tokens


def test_a_stream_of_embeddings_and_its_end():
    settings = dataclasses.replace(SETTINGS["greedy"], eos_ids=(), max_new_tokens=1)
    embeddings = PARAMS["embed"]["embedding"][PROMPT]
    steps, rows = _streamed(settings, 4, embeddings=embeddings)
    assert len(steps) == 1
    assert rows == _rows(generate(MODEL, PARAMS, settings, tokens=PROMPT))


def test_one_program_runs_all_steps_whatever_the_chunk():
    settings = dataclasses.replace(SETTINGS["greedy"], eos_ids=(), max_new_tokens=8)
    before = streaming._advance._cache_size()
    for chunk in (1, 2, 3, 7):
        _streamed(settings, chunk, tokens=PROMPT)
    assert streaming._advance._cache_size() - before == 1


def test_a_stream_can_be_left():
    settings = dataclasses.replace(SETTINGS["greedy"], eos_ids=())
    steps = stream(MODEL, PARAMS, settings, tokens=PROMPT, chunk=2)
    first = next(steps)
    steps.close()
    assert [len(row) for row in first] == [1, 1, 1]
    assert list(steps) == []


def test_blocks_with_arrays_of_their_own_say_the_same():
    apart, settings = unstacked(PARAMS), SETTINGS["greedy"]
    wanted = generate(MODEL, PARAMS, settings, tokens=PROMPT)
    found = generate(MODEL, apart, settings, tokens=PROMPT)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5)
    both = [MODEL.apply({"params": p}, PROMPT, return_layers=(0, -1)) for p in (PARAMS, apart)]
    for name in ("logits", "hidden", "features"):
        np.testing.assert_allclose(*(getattr(out, name) for out in both), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="train with stacked ones"):
        MODEL.apply({"params": apart}, PROMPT, train=True)


# Rows know nothing of each other ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["sampled", "edited"])
def test_a_row_is_the_same_in_whatever_batch_it_stands(name):
    """Alone, in another place, beside other rows, with more padding: with its own key."""
    keys = jax.random.split(jax.random.key(1), 3)
    wanted = _rows(generate(MODEL, PARAMS, SETTINGS[name], tokens=PROMPT, rng=keys))
    for row in range(3):
        one = slice(row, row + 1)
        alone = generate(MODEL, PARAMS, SETTINGS[name], tokens=PROMPT[one], rng=keys[one])
        assert _rows(alone) == [wanted[row]]
    others = tiny_llm.tokens(4, 7, seed=9)
    others[2, 2:], mask = PROMPT[0], np.ones((4, 7), bool)
    mask[2, :2] = False
    moved = jax.random.split(jax.random.key(8), 4).at[2].set(keys[0])
    found = _rows(generate(MODEL, PARAMS, SETTINGS[name], tokens=others, mask=mask, rng=moved))
    assert found[2] == wanted[0]


def test_one_key_gives_each_row_its_own():
    settings = dataclasses.replace(SETTINGS["sampled"], eos_ids=())
    rng, same = jax.random.key(3), np.repeat(PROMPT[:1], 3, axis=0)
    rows = _rows(generate(MODEL, PARAMS, settings, tokens=same, rng=rng))
    assert len({tuple(row) for row in rows}) == 3
    # Row i's draws do not depend on how many rows there are, nor on what stands in them.
    assert _rows(generate(MODEL, PARAMS, settings, tokens=same[:1], rng=rng)) == rows[:1]
    other = np.concatenate([PROMPT[1:], same[:1]])
    assert _rows(generate(MODEL, PARAMS, settings, tokens=other, rng=rng))[2] == rows[2]
    keys = one_path.row_keys(jax.random.PRNGKey(3), 2)  # the same key as plain numbers
    assert (keys == one_path.row_keys(rng, 2)).all()
    with pytest.raises(ConfigError, match="one for each of 3"):
        generate(MODEL, PARAMS, settings, tokens=same, rng=jax.random.split(rng, 2))


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [generate, stream])
def test_prompts_that_do_not_fit(call):
    model = Llm(dataclasses.replace(CONFIG, context_length=12))
    settings = dataclasses.replace(SETTINGS["greedy"], max_new_tokens=8)
    with pytest.raises(DataError, match=r"prompt 0 has 5 tokens.*max_new_tokens=8.*the 12 of the"):
        call(model, PARAMS, settings, tokens=PROMPT)
    mask = np.ones(PROMPT.shape, bool)
    mask[:, 0] = False  # padding is none of the context
    out = call(model, PARAMS, settings, tokens=PROMPT, mask=mask)
    assert out is not None
    mask[1] = False
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        call(model, PARAMS, settings, tokens=PROMPT, mask=mask)
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        call(model, PARAMS, settings, tokens=PROMPT[:, :0])


def test_what_cannot_be_streamed():
    with pytest.raises(ConfigError, match="num_beams > 1 cannot be streamed"):
        stream(MODEL, PARAMS, dataclasses.replace(SETTINGS["greedy"], num_beams=2), tokens=PROMPT)
    with pytest.raises(ConfigError, match="chunk=0"):
        stream(MODEL, PARAMS, SETTINGS["greedy"], tokens=PROMPT, chunk=0)
    with pytest.raises(ConfigError, match="needs rng"):
        stream(MODEL, PARAMS, SETTINGS["sampled"], tokens=PROMPT)
