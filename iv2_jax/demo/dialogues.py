"""Conversations about the demo's clips, and questions with options about the held-out ones.

All that is asked follows from labels and captions. Answers cannot be guessed from a question:
among the held-out questions of a kind every answer is right equally often, in every place, so that
a model that is shown another clip is at chance.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.data.instruct import ours
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn, kind_of
from iv2_jax.data.records import Clip
from iv2_jax.demo.games import GAMES
from iv2_jax.eval.answers_prompts import Question

CAPTION = "video"
# Labels that are not asked about: sound is not shown, and a change of the score is some pixels.
UNSEEN = ("sound", "score")
# A class with fewer clips is not asked about.
TRAIN_CLIPS, TEST_CLIPS = 10, 3
OPTIONS = 4
# Form of a question -> what its task is called behind the label.
_TASKS = {"open": "", "either": ", two options", "whether": ", yes or no"}
DESCRIBE = ("What is happening?", "Describe the clip.", "What do you see?")


@dataclasses.dataclass(frozen=True)
class Facet:
    """Something that is known of many clips, and how it is asked for.

    Attributes:
      label: name of the label set.
      open: wordings without options.
      either: wording with two options, `{a}` and `{b}`; empty for none.
      whether: wording whose answer is yes or no, with `{a}`; empty for none.
      answers: label -> how it is said.
    """

    label: str
    open: tuple[str, ...]
    either: str = ""
    whether: str = ""
    answers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def say(self, value: str | int) -> str:
        """The words for a label."""
        return self.answers.get(str(value), str(value).replace("_", " "))


# No wording names what is played with: "the paddle" would tell the game.
GAME_FACETS = (
    Facet(
        "game",
        ("Which game is this?", "What game is being played?", "Name the game."),
        "Is this {a} or {b}?",
        "Is this {a}?",
        {game.rom: game.title for game in GAMES},
    ),
    Facet(
        "action",
        ("Which way does the player move?", "In which direction is the player steered?"),
        "",
        "",
        {"none": "nowhere"},
    ),
    Facet(
        "place",
        ("Where is the player at first?", "On which side does the player start?"),
    ),
)


@dataclasses.dataclass(frozen=True)
class _Known:
    """A facet with the classes that are asked about."""

    facet: Facet
    classes: tuple[str, ...]

    def class_of(self, clip: Clip) -> int | None:
        """Number of a clip's class; None for one that is not asked about."""
        value = str(clip.labels.get(self.facet.label))
        return self.classes.index(value) if value in self.classes else None

    @property
    def forms(self) -> tuple[str, ...]:
        """In which forms it is asked for."""
        return tuple(form for form in _TASKS if getattr(self.facet, form))

    def words(self, number: int) -> str:
        """How a class is said; numbers go round."""
        return self.facet.say(self.classes[number % len(self.classes)])


def known_facets(clips: Sequence[Clip]) -> list[_Known]:
    """What can be asked of clips: labels of which two or more classes have clips in both splits."""
    named = {facet.label: facet for facet in GAME_FACETS}
    ours_ = any(clip.labels.get("game") in GAME_FACETS[0].answers for clip in clips)
    labels = dict.fromkeys(name for clip in clips for name in clip.labels if name not in UNSEEN)
    found = []
    for label in labels:
        counts = {
            split: Counter(
                str(c.labels[label]) for c in clips if c.split == split and label in c.labels
            )
            for split in ("train", "test")
        }
        classes = tuple(
            sorted(
                name
                for name, count in counts["train"].items()
                if count >= TRAIN_CLIPS and counts["test"][name] >= TEST_CLIPS
            )
        )
        if len(classes) >= 2:
            facet = named[label] if ours_ and label in named else _plain(label)
            found.append(_Known(facet, classes))
    return found


def _plain(label: str) -> Facet:
    """A facet of a label that is only known by name."""
    name = label.replace("_", " ")
    return Facet(
        label,
        (f"What is the {name} of this clip?", f"Name the {name}."),
        f"Is the {name} {{a}} or {{b}}?",
        f"Is the {name} {{a}}?",
    )


def conversations(clips: Sequence[Clip], *, visits: int, seed: int = 0) -> list[Conversation]:
    """Conversations about the training clips, `visits` of each in other words.

    A conversation asks once for everything that is known, in turns that do not refer to each other.
    Forms (open, two options, yes or no), wrong options and yes and no alternate within a class, so
    that none goes with a class.

    Args:
      clips: all clips; those of split `train` are talked about.
      visits: conversations about each clip.
      seed: of the wordings.
    """
    facets = known_facets(clips)
    rng = np.random.default_rng(seed)
    train = [clip for clip in clips if clip.split == "train"]
    counts: Counter[tuple[str, int]] = Counter()
    found = []
    for visit in range(visits):
        for place in rng.permutation(len(train)):  # so that forms go with no other label
            clip, turns = train[place], []
            for known in facets:
                own = known.class_of(clip)
                if own is not None:
                    number = counts[known.facet.label, own]
                    counts[known.facet.label, own] += 1
                    turns.append(_turn(known, own, number, rng))
            # Those of the games name what is played with, and so the game.
            if clip.labels.get("game") not in GAME_FACETS[0].answers:
                turns += [Turn(question, answer) for question, answer in clip.qa]
            texts = clip.captions.get(CAPTION)
            # Long answers, so not every time where there is more to say.
            if texts and (len(turns) < 2 or (visit + place) % 2 == 0):
                turns.append(Turn(str(rng.choice(DESCRIBE)), texts[visit % len(texts)]))
            if turns:
                found.append(Conversation(tuple(turns), (_medium(clip),), id=f"{clip.id}/{visit}"))
    return found


def _turn(known: _Known, own: int, number: int, rng: np.random.Generator) -> Turn:
    """The `number`-th question about a class, in one of the facet's forms."""
    forms = known.forms
    form, number = forms[number % len(forms)], number // len(forms)
    if form == "open":
        return Turn(str(rng.choice(known.facet.open)), known.words(own))
    question, options, answer = _closed(known, form, own, number)
    return Turn(question, options[answer])


def _closed(known: _Known, form: str, own: int, number: int) -> tuple[str, tuple[str, ...], int]:
    """The `number`-th closed question of a class, its options and the place of the answer."""
    other = own + 1 + (number // 2) % (len(known.classes) - 1)
    if form == "either":
        pair = (known.words(own), known.words(other))
        answer = number % 2
        options = pair[::-1] if answer else pair
        return known.facet.either.format(a=options[0], b=options[1]), options, answer
    asked = other if number % 2 else own
    return known.facet.whether.format(a=known.words(asked)), ("yes", "no"), number % 2


def questions(clips: Sequence[Clip], *, total: int = 120) -> list[Question]:
    """Questions about held-out clips, in balanced numbers.

    The tasks are labels and how they are asked for (`game`, `game, two options`, ...), and
    `caption`: which of four captions fits.

    Args:
      clips: all clips; those of split `test` are asked about.
      total: about how many; shared by the tasks.
    """
    test = [clip for clip in clips if clip.split == "test"]
    captioned = [clip for clip in test if clip.captions.get(CAPTION)]
    kinds = [(known, form) for known in known_facets(clips) for form in known.forms]
    most = total // (len(kinds) + 1)
    found = []
    for known, form in kinds:
        found += _about_facet(known, form, test, most)
    return found + _about_captions(captioned, most)


def _about_facet(known: _Known, form: str, test: Sequence[Clip], most: int) -> list[Question]:
    """Equally many questions about every class."""
    members: list[list[Clip]] = [[] for _ in known.classes]
    for clip in test:
        if (own := known.class_of(clip)) is not None:
            members[own].append(clip)
    count = min(max(most // len(members), 1), *map(len, members))
    if form != "open" and count > 1:
        count -= count % 2  # as many first as second options, yes as no
    found = []
    for own, its in enumerate(members):
        for number, clip in enumerate(_spread(its, count)):
            # With one question a class, classes take turns.
            asked = _closed(known, form, own, number if count > 1 else own)
            if form == "open":
                text = known.facet.open[number % len(known.facet.open)]
                asked = text, *_among(known, own, number)
            found.append(_question(known.facet.label + _TASKS[form], clip, *asked))
    return found


def _among(known: _Known, own: int, number: int) -> tuple[tuple[str, ...], int]:
    """A class among others, all of them if they are few; and its place."""
    size = min(OPTIONS, len(known.classes))
    first = number if size < len(known.classes) else 0
    others = [own + 1 + (first + i) % (len(known.classes) - 1) for i in range(size - 1)]
    options = [known.words(number) for number in (own, *others)]
    place = (own + number) % size
    options[0], options[place] = options[place], options[0]
    return tuple(options), place


def _about_captions(clips: Sequence[Clip], most: int) -> list[Question]:
    """Which caption fits: every caption is right once and wrong `OPTIONS - 1` times."""
    different = list({clip.captions[CAPTION][0]: clip for clip in clips}.values())
    if len(different) < OPTIONS:
        return []
    shown = _spread(different, min(max(most, OPTIONS), len(different)))
    texts = [clip.captions[CAPTION][0] for clip in shown]
    steps = [round(len(shown) * i / OPTIONS) for i in range(1, OPTIONS)]
    found = []
    for number, clip in enumerate(shown):
        options = [texts[number], *(texts[(number + step) % len(shown)] for step in steps)]
        place = number % OPTIONS
        options[0], options[place] = options[place], options[0]
        text = DESCRIBE[number % len(DESCRIBE)]
        found.append(_question("caption", clip, text, tuple(options), place))
    return found


def _question(task: str, clip: Clip, text: str, options: tuple[str, ...], answer: int) -> Question:
    """A question whose name no other has."""
    return Question(f"{task}/{clip.id}", text, options[answer], options, _medium(clip), task)


def held_out(clips: Sequence[Clip], *, most: int) -> list[Conversation]:
    """Conversations about some held-out clips, everything in open questions, for transcripts."""
    facets = known_facets(clips)
    test = [clip for clip in clips if clip.split == "test"]
    found = []
    for number, clip in enumerate(_spread(test, min(most, len(test)))):
        turns = []
        if texts := clip.captions.get(CAPTION):
            turns.append(Turn(DESCRIBE[number % len(DESCRIBE)], texts[0]))
        for known in facets:
            if (own := known.class_of(clip)) is not None:
                wordings = known.facet.open
                turns.append(Turn(wordings[number % len(wordings)], known.words(own)))
        if turns:
            found.append(Conversation(tuple(turns), (_medium(clip),), id=clip.id))
    return found


def _spread(clips: Sequence[Clip], count: int) -> list[Clip]:
    """`count` clips from everywhere in the list."""
    places = (np.arange(count) + 0.5) * len(clips) / max(count, 1)
    return [clips[int(place)] for place in places]


def _medium(clip: Clip) -> Medium:
    """The clip as what a conversation shows; its file is found from everywhere."""
    path = clip.path if "://" in clip.path else os.path.abspath(clip.path)
    return Medium(kind_of(clip.path), path, clip.start, clip.end)


@dataclasses.dataclass(frozen=True)
class DialogueFiles:
    """What stage 3 learns from and is asked.

    Attributes:
      train: conversations about training clips, one a line.
      questions: questions with options about held-out clips, as `iv2 eval --task choices` reads.
      held_out: conversations about held-out clips, as `iv2 eval --task answers` reads.
    """

    train: Path
    questions: Path
    held_out: Path


def write(
    folder: Path, clips: Sequence[Clip], *, visits: int = 4, total: int = 120, shown: int = 8
) -> DialogueFiles:
    """Writes the three files.

    Args:
      folder: where to.
      clips: all clips.
      visits: conversations about each training clip.
      total: about how many questions with options.
      shown: held-out clips that are talked about in full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = DialogueFiles(
        *(folder / f"{name}.jsonl" for name in ("dialogues", "questions", "held_out"))
    )
    _write(files.train, map(ours.to_record, conversations(clips, visits=visits)))
    _write(files.questions, map(_record, questions(clips, total=total)))
    _write(files.held_out, map(ours.to_record, held_out(clips, most=shown)))
    return files


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _record(question: Question) -> dict[str, Any]:
    """A question as a line of a plain list; see `eval.choices_data`."""
    medium = question.medium
    ends = {"start": medium.start, "end": medium.end}
    return {
        "id": question.id,
        "task": question.task,
        medium.kind: medium.path,
        **{name: value for name, value in ends.items() if value is not None},
        "question": question.text,
        "options": list(question.options),
        "answer": question.number,
    }
