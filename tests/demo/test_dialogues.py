"""Conversations about the demo's clips: nothing is told beforehand, nothing can be guessed."""

from __future__ import annotations

import collections
import json

import pytest

from iv2_jax.data.instruct import formats
from iv2_jax.data.records import Clip
from iv2_jax.demo import dialogues
from iv2_jax.demo.games import GAMES
from iv2_jax.eval.choices_data import read_choices

ACTIONS = ("none", "left", "right")


@pytest.fixture(scope="module")
def clips():
    """As the demo records them: every game with every action, unevenly many places."""
    return [
        Clip(
            id=f"{game.rom}_{start:02d}_{action}",
            path=f"/clips/{game.rom}_{start:02d}_{action}.mp4",
            split="train" if start < 10 else "test",
            labels={
                "topic": "video game",
                "game": game.rom,
                "action": action,
                "place": "left" if start % 4 == 0 else "right",
                "sound": "steady" if start % 2 else "bursts",
            },
            captions={"video": (f"{game.title}: {action} {start}.", f"Also {game.title}.")},
        )
        for game in GAMES
        for start in range(16)
        for action in ACTIONS
    ]


@pytest.fixture(scope="module")
def asked(clips):
    return dialogues.questions(clips, total=240)


def test_training_and_held_out_clips_are_apart(clips, asked):
    talks = dialogues.conversations(clips, visits=2)
    trained = {c.media[0].path for c in talks}
    shown = {c.media[0].path for c in dialogues.held_out(clips, most=8)}
    held_out = {q.medium.path for q in asked} | shown
    assert trained == {clip.path for clip in clips if clip.split == "train"}
    assert held_out <= {clip.path for clip in clips if clip.split == "test"}
    assert len(talks) == 2 * len(trained)
    assert len(shown) == 8


def test_every_kind_is_asked(asked):
    kinds = collections.Counter(question.task for question in asked)
    game = {"game", "game, two options", "game, yes or no"}
    assert set(kinds) == game | {"action", "place", "caption"}
    assert min(kinds.values()) >= 20


def test_answers_cannot_be_guessed(asked):
    for task in {question.task for question in asked}:
        mine = [question for question in asked if question.task == task]
        right = collections.Counter(question.answer for question in mine)
        offered = collections.Counter(option for q in mine for option in q.options)
        assert len(set(right.values())) == 1, task
        # No option is right more often than the others when it is offered.
        assert len({right[option] / offered[option] for option in offered}) == 1, task
        places = collections.Counter(question.number for question in mine)
        assert max(places.values()) - min(places.values()) <= len(mine) / 8, task


def test_no_form_goes_with_another_label(clips):
    """Which form a question about the game has must not tell the action."""
    seen = collections.defaultdict(collections.Counter)
    for talk in dialogues.conversations(clips, visits=3):
        text = next(
            t.question for t in talk.turns if "game" in t.question or "Is this" in t.question
        )
        form = "yes or no" if text.startswith("Is this") and " or " not in text else "other"
        seen[talk.id.split("/")[0].rsplit("_", 1)[1]][form] += 1
    shares = [seen[a]["yes or no"] / sum(seen[a].values()) for a in ACTIONS]
    assert max(shares) - min(shares) < 0.1


def test_no_question_tells_the_game(clips):
    players = [game.player for game in GAMES]
    for talk in dialogues.conversations(clips, visits=1):
        for turn in talk.turns:
            assert not any(player in turn.question for player in players)


def test_captions_alone_are_enough():
    clips = [
        Clip(id=str(i), path=f"{i}.mp4", split=split, captions={"video": (f"a dog, take {i}",)})
        for split in ("train", "test")
        for i in range(6)
    ]
    assert {t.answer for c in dialogues.conversations(clips, visits=1) for t in c.turns} == {
        f"a dog, take {i}" for i in range(6)
    }
    asked = dialogues.questions(clips)
    assert [question.task for question in asked] == ["caption"] * 6
    assert all(len(set(question.options)) == 4 for question in asked)


def test_labels_of_any_manifest_are_asked_for():
    clips = [
        Clip(
            id=f"{split}{i}",
            path=f"{i}.mp4",
            split=split,
            labels={"sport": ("judo", "golf")[i % 2]},
        )
        for split in ("train", "test")
        for i in range(20)
    ]
    texts = {question.text for question in dialogues.questions(clips)}
    assert "What is the sport of this clip?" in texts
    assert "Is the sport judo?" in texts


def test_the_files_are_what_the_verbs_read(clips, tmp_path, asked):
    files = dialogues.write(tmp_path, clips, visits=1, total=240, shown=3)
    talks = formats.read(str(files.train), missing="ignore")
    assert len(talks) == sum(clip.split == "train" for clip in clips)
    assert len(formats.read(str(files.held_out), missing="ignore")) == 3
    lines = [json.loads(line) for line in files.questions.read_text().splitlines()]
    # Clips that are there, as the reader asks for.
    for line in lines:
        line["video"] = str(files.train)
    files.questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_choices(files.questions).questions
    assert [(q.task, q.text, q.options, q.answer) for q in found] == [
        (q.task, q.text, q.options, q.answer) for q in asked
    ]
