"""What is said about a recorded clip."""

from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.demo.games import GAMES, SoundFacts, describe, sound_facts

SILENT = SoundFacts("silent", None)


def tone(frames, per_frame=1024):
    """Sound in the frames whose entry is 1."""
    wave = np.sin(np.arange(len(frames) * per_frame)) * 8000
    return (wave * np.repeat(frames, per_frame)).astype(np.int16)


def test_games_are_distinct_and_sensible():
    assert len({g.rom for g in GAMES}) == len(GAMES) >= 8
    assert {"breakout", "kaboom", "assault"} <= {g.rom for g in GAMES}
    for game in GAMES:
        assert 0 < game.pace <= 1
        assert game.fire_every > 1


def test_every_game_is_in_the_package():
    roms = pytest.importorskip("ale_py.roms", reason="needs ale-py")
    assert all(roms.get_rom_path(game.rom).is_file() for game in GAMES)


@pytest.mark.parametrize(
    ("sounding", "kind", "first"),
    [
        (np.zeros(60), "silent", None),
        (np.arange(60) >= 58, "silent", None),  # under 5 %
        (np.arange(60) % 2, "bursts", 1),
        (np.arange(60) >= 6, "steady", 6),
    ],
)
def test_loudness_is_measured(sounding, kind, first):
    assert sound_facts(tone(sounding), 60) == SoundFacts(kind, first)


@pytest.mark.parametrize(
    ("action", "words", "answer"),
    [("none", "left alone", "nowhere"), ("left", "left", "left"), ("right", "right", "right")],
)
def test_captions_and_answers_say_the_action(action, words, answer):
    facts = describe(GAMES[0], action, 0.2, np.zeros(60), SILENT)
    assert facts["labels"]["action"] == action
    assert facts["labels"]["game"] == "breakout"
    assert words in facts["captions"]["video"][0]
    assert dict(facts["qa"])["Which way is the paddle steered?"] == answer
    assert facts["captions"]["audio"] == ("No sound.",)


@pytest.mark.parametrize(("place", "name"), [(0.1, "left"), (0.5, "middle"), (0.9, "right")])
def test_captions_and_answers_say_where_the_player_is(place, name):
    facts = describe(GAMES[0], "none", place, np.zeros(60), SILENT)
    assert facts["labels"]["place"] == name
    assert all(name in caption for caption in facts["captions"]["video"])
    assert dict(facts["qa"])["Where is the paddle at first?"] == name


def test_captions_of_sound_name_the_game():
    facts = describe(GAMES[0], "none", 0.5, np.zeros(60), SoundFacts("steady", 0))
    assert facts["captions"]["audio"] == ("Electronic sound of the game Breakout all the time.",)


def answers(score_at, sound):
    rewards = np.zeros(60)
    rewards[list(score_at)] = 1
    facts = describe(GAMES[0], "none", 0.5, rewards, sound)
    return facts["labels"]["score"], dict(facts["qa"])


HALF = "In which half of the clip does the score change?"
FIRST = "Which comes first, a sound or a change of the score?"


def test_score_questions_follow_the_facts():
    score, qa = answers([], SoundFacts("steady", 0))
    assert score == "no"
    assert qa["Does the score change?"] == "no"
    assert not {HALF, FIRST} & set(qa)
    score, qa = answers([10], SoundFacts("bursts", 20))
    assert (score, qa[HALF], qa[FIRST]) == ("yes", "first", "score")
    _, qa = answers([40, 50], SoundFacts("bursts", 5))
    assert (qa[HALF], qa[FIRST]) == ("second", "sound")
    _, qa = answers([10, 50], SILENT)  # in both halves, and no sound: no such questions
    assert not {HALF, FIRST} & set(qa)
    _, qa = answers([20], SoundFacts("bursts", 20))  # at once: neither is first
    assert FIRST not in qa
