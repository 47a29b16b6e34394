"""Decoding: against plain loops over uncached logits, exhaustive beams, ends, and support."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.models import decoding
from iv2_jax.models.beam_search import beam_search
from iv2_jax.models.generate import GenerationConfig, generate
from iv2_jax.models.llm import Llm
from tests.models import tiny_llm

CONFIG = tiny_llm.config()
MODEL = Llm(CONFIG)
PARAMS = tiny_llm.params(CONFIG)
GREEDY = GenerationConfig(max_new_tokens=6, eos_ids=())


@partial(jax.jit, static_argnames="config")
def _last_logits(params, tokens, length, config):
    logits = Llm(config).apply({"params": params}, tokens).logits
    return jax.lax.dynamic_index_in_dim(logits, length - 1, axis=1, keepdims=False)


def _log_probs(row, config=CONFIG, params=PARAMS):
    """Next token's log-probabilities of one row, run from its start without a cache."""
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(jax.nn.log_softmax(_last_logits(params, padded, len(row), config)[0]))


def _greedy(prompt, count, penalty=1.0, forbid=lambda step: ()):
    """A plain greedy loop over uncached logits; gives tokens and their log-probability."""
    row, score = list(prompt), 0.0
    for step in range(count):
        log_probs = _log_probs(row)
        edited = log_probs.copy()
        if penalty != 1:
            logits = np.asarray(
                _last_logits(PARAMS, np.pad([row], ((0, 0), (0, 16 - len(row)))), len(row), CONFIG)[
                    0
                ]
            )
            seen = sorted(set(row))
            edited = logits.copy()
            edited[seen] = np.where(
                edited[seen] < 0, edited[seen] * penalty, edited[seen] / penalty
            )
        edited[list(forbid(step))] = -np.inf
        row.append(int(edited.argmax()))
        score += log_probs[row[-1]]
    return row[len(prompt) :], score


def test_greedy_is_the_plain_loop_from_tokens_and_embeddings():
    prompt = tiny_llm.tokens(2, 5)
    out = generate(MODEL, PARAMS, GREEDY, tokens=prompt)
    for row in range(2):
        tokens, score = _greedy(prompt[row], 6)
        np.testing.assert_array_equal(out.tokens[row], tokens)
        np.testing.assert_allclose(out.scores[row], score, rtol=1e-5)
    embeddings = PARAMS["embed"]["embedding"][prompt]
    again = generate(MODEL, PARAMS, GREEDY, embeddings=embeddings)
    np.testing.assert_array_equal(again.tokens, out.tokens)


def test_rows_end_at_different_times():
    prompt = tiny_llm.tokens(3, 5, seed=4)
    free = np.asarray(generate(MODEL, PARAMS, GREEDY, tokens=prompt).tokens)
    # End tokens chosen so that one row ends at once, one later and one (of other tokens) not.
    first = int(free[0, 0])
    second = next(int(t) for t in free[1, 2:] if t != first)
    settings = dataclasses.replace(GREEDY, eos_ids=(first, second), pad_id=22)
    out = generate(MODEL, PARAMS, settings, tokens=prompt)
    lengths = []
    for row in free:
        ends = [i + 1 for i, token in enumerate(row) if token in (first, second)]
        lengths.append(min(ends, default=6))
    assert lengths[0] == 1
    assert len(set(lengths)) > 1
    np.testing.assert_array_equal(out.lengths, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(out.tokens[row, :length], free[row, :length])
        np.testing.assert_array_equal(out.tokens[row, length:], 22)
        _, score = _greedy(prompt[row], length)
        np.testing.assert_allclose(out.scores[row], score, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_on_either_side_changes_nothing(beams):
    prompt = tiny_llm.tokens(3, 5, seed=1)
    settings = dataclasses.replace(GREEDY, num_beams=beams, repetition_penalty=1.3)
    lengths = [5, 3, 4]
    sides = {side: (np.full((3, 6), 21), np.zeros((3, 6), bool)) for side in ("left", "right")}
    for row, length in enumerate(lengths):
        for side, (tokens, mask) in sides.items():
            at = slice(6 - length, 6) if side == "left" else slice(0, length)
            tokens[row, at], mask[row, at] = prompt[row, :length], True
    left, right = (generate(MODEL, PARAMS, settings, tokens=t, mask=m) for t, m in sides.values())
    np.testing.assert_array_equal(left.tokens, right.tokens)
    for row, length in enumerate(lengths[:2]):
        alone = generate(MODEL, PARAMS, settings, tokens=prompt[row : row + 1, :length])
        np.testing.assert_array_equal(left.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(left.scores[row], alone.scores[0], rtol=1e-4)


def test_min_new_tokens_and_repetition_penalty_are_the_plain_loop():
    prompt = tiny_llm.tokens(1, 5, seed=2)
    free, _ = _greedy(prompt[0], 1)
    settings = dataclasses.replace(
        GREEDY, eos_ids=(free[0],), min_new_tokens=3, repetition_penalty=1.7
    )
    out = generate(MODEL, PARAMS, settings, tokens=prompt)
    wanted, _ = _greedy(prompt[0], 6, 1.7, lambda step: (free[0],) if step < 3 else ())
    length = wanted.index(free[0]) + 1 if free[0] in wanted else 6
    assert length > 3
    np.testing.assert_array_equal(out.tokens[0, :length], wanted[:length])
    assert out.lengths[0] == length


def test_a_stop_sequence_ends_a_row():
    prompt = tiny_llm.tokens(2, 5)
    free = np.asarray(generate(MODEL, PARAMS, GREEDY, tokens=prompt).tokens)
    stop = tuple(int(t) for t in free[0, 2:4])
    settings = dataclasses.replace(GREEDY, stop_sequences=(stop, (1, 1, 1, 1, 1, 1, 1)))
    out = generate(MODEL, PARAMS, settings, tokens=prompt)
    pairs = [tuple(free[0, i : i + 2]) for i in range(5)]
    length = pairs.index(stop) + 2
    assert out.lengths[0] == length
    np.testing.assert_array_equal(out.tokens[0], [*free[0, :length], *[0] * (6 - length)])


# --- sampling ---------------------------------------------------------------------------------


def test_top_k_and_top_p_leave_the_right_tokens():
    logits = jnp.log(jnp.array([[0.5, 0.1, 0.25, 0.15], [0.05, 0.05, 0.05, 0.85]]))

    def support(**settings):
        kept = decoding.sampling_logits(logits, GenerationConfig(**settings)) > -jnp.inf
        return [sorted(np.flatnonzero(row).tolist()) for row in np.asarray(kept)]

    every = [0, 1, 2, 3]
    assert support() == [every, every]
    assert support(top_k=2)[0] == [0, 2]
    assert support(top_k=2)[1] == every  # ties with the second best all stay
    assert support(top_p=0.74) == [[0, 2], [3]]
    assert support(top_p=0.76) == [[0, 2, 3], [3]]
    assert support(top_p=1e-6) == [[0], [3]]
    assert support(top_k=3, top_p=0.8)[0] == [0, 2]  # p of what top-k left: 0.75 / 0.9 > 0.8
    assert support(temperature=4.0, top_p=0.5)[0] == [0, 2]  # flatter: one no longer suffices
    assert support(top_k=9)[0] == every
    kept = decoding.sampling_logits(logits, GenerationConfig(temperature=2.0))
    np.testing.assert_allclose(kept, logits / 2.0)


def test_samples_have_the_models_distribution():
    prompt = np.repeat(tiny_llm.tokens(1, 3), 3000, axis=0)
    settings = GenerationConfig(max_new_tokens=1, eos_ids=(), do_sample=True, top_k=5)
    out = generate(MODEL, PARAMS, settings, tokens=prompt, rng=jax.random.key(0))
    log_probs = _log_probs(prompt[0])
    best = np.argsort(-log_probs)[:5]
    wanted = np.zeros(tiny_llm.VOCAB)
    wanted[best] = np.exp(log_probs[best]) / np.exp(log_probs[best]).sum()
    drawn = np.bincount(np.asarray(out.tokens[:, 0]), minlength=tiny_llm.VOCAB) / 3000
    assert drawn[wanted == 0].sum() == 0
    assert np.abs(drawn - wanted).max() < 5 * 0.5 / 3000**0.5


def test_samples_differ_by_key_and_by_step():
    prompt = np.repeat(tiny_llm.tokens(1, 3), 4, axis=0)
    settings = GenerationConfig(max_new_tokens=6, eos_ids=(), do_sample=True, temperature=3.0)
    a, b, c = (
        np.asarray(generate(MODEL, PARAMS, settings, tokens=prompt, rng=jax.random.key(i)).tokens)
        for i in (0, 1, 0)
    )
    assert (a != b).any()
    np.testing.assert_array_equal(a, c)
    assert (a[0] != a[1]).any()
    greedy_like = dataclasses.replace(settings, top_k=1)
    out = generate(MODEL, PARAMS, greedy_like, tokens=prompt, rng=jax.random.key(3))
    np.testing.assert_array_equal(out.tokens, generate(MODEL, PARAMS, GREEDY, tokens=prompt).tokens)


# --- beam search ------------------------------------------------------------------------------


def _best_sequence(prompt, config, params, settings):
    """The best of all ended sequences, by trying every one."""
    vocab, longest = config.vocab_size, settings.max_new_tokens
    scores = {}
    for sequence in itertools.product(range(vocab), repeat=longest):
        ends = [i for i, token in enumerate(sequence) if token in settings.eos_ids]
        sequence = sequence[: ends[0] + 1] if ends else sequence
        if sequence in scores:
            continue
        total = sum(
            _log_probs([*prompt, *sequence[:i]], config, params)[token]
            for i, token in enumerate(sequence)
        )
        scores[sequence] = total / len(sequence) ** settings.length_penalty
    return max(scores.items(), key=lambda item: item[1])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_the_best_of_all_sequences(length_penalty):
    config = tiny_llm.config(vocab_size=4)
    settings = GenerationConfig(
        max_new_tokens=3, eos_ids=(1,), num_beams=16, length_penalty=length_penalty
    )
    for seed in range(3):
        params = tiny_llm.params(config, seed)
        prompt = tiny_llm.tokens(2, 3, seed=seed, vocab_size=4)
        out = generate(Llm(config), params, settings, tokens=prompt)
        for row in range(2):
            sequence, score = _best_sequence(prompt[row], config, params, settings)
            assert out.lengths[row] == len(sequence)
            np.testing.assert_array_equal(out.tokens[row, : len(sequence)], sequence)
            np.testing.assert_allclose(out.scores[row], score, rtol=1e-4)


def test_a_beam_of_one_is_greedy():
    prompt = tiny_llm.tokens(3, 5, seed=4)
    free = np.asarray(generate(MODEL, PARAMS, GREEDY, tokens=prompt).tokens)
    settings = dataclasses.replace(
        GREEDY, eos_ids=(int(free[0, 1]),), early_stopping=True, length_penalty=0.0
    )
    wanted = generate(MODEL, PARAMS, settings, tokens=prompt)

    @jax.jit
    def search(params, embeddings):
        logits, cache = decoding.prefill(MODEL, params, embeddings, None, 10)
        return beam_search(MODEL, params, settings, logits, cache, None, prompt_length=5)

    out = search(PARAMS, PARAMS["embed"]["embedding"][prompt])
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_array_equal(out.lengths, wanted.lengths)
    np.testing.assert_allclose(out.scores, wanted.scores, rtol=1e-5)
    assert len(set(np.asarray(out.lengths).tolist())) > 1


def test_wider_beams_score_their_sequence_rightly():
    """The score is the log-probability of the tokens given out: the cache follows its beam."""
    prompt = tiny_llm.tokens(2, 5, seed=3)
    settings = dataclasses.replace(GREEDY, num_beams=4)
    out = generate(MODEL, PARAMS, settings, tokens=prompt)
    greedy = generate(MODEL, PARAMS, GREEDY, tokens=prompt)
    for row in range(2):
        tokens = np.asarray(out.tokens[row])
        total = sum(_log_probs([*prompt[row], *tokens[:i]])[t] for i, t in enumerate(tokens))
        np.testing.assert_allclose(out.scores[row], total / 6, rtol=1e-4)
        assert total >= greedy.scores[row] - 1e-4
    assert (np.asarray(out.tokens) != np.asarray(greedy.tokens)).any()


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_new_tokens": 201}, "min_new_tokens=201"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beams": 2, "do_sample": True}, "do_sample=False"),
        ({"stop_sequences": ((),)}, "empty sequence"),
    ],
)
def test_settings_name_the_field(settings, message):
    with pytest.raises(ConfigError, match=message):
        GenerationConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_ids": (23,)}, "eos_ids: 23 is no id of a vocabulary of 23"),
        ({"pad_id": -1}, "pad_id: -1"),
        ({"stop_sequences": ((1, 40),)}, "stop_sequences: 40"),
        ({"do_sample": True}, "needs rng"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings, message):
    settings = dataclasses.replace(GREEDY, **settings)
    with pytest.raises(ConfigError, match=message):
        generate(MODEL, PARAMS, settings, tokens=tiny_llm.tokens(1, 2))


def test_a_prompt_is_tokens_or_embeddings():
    with pytest.raises(ValueError, match="either tokens or embeddings"):
        generate(MODEL, PARAMS, GREEDY)
