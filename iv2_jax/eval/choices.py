"""Accuracy of a chat model on questions with options, MVBench's and others (spec stage3 11)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError
from iv2_jax.eval.answer_parser import PARSERS, is_right
from iv2_jax.eval.answers import MAX_NEW_TOKENS, Asker
from iv2_jax.eval.answers_kept import KeptAnswers, fingerprint
from iv2_jax.eval.answers_prompts import Question, get_prompt
from iv2_jax.eval.answers_stats import PairedResult, mean_interval, paired, wilson
from iv2_jax.eval.chat_runs import ChatModel
from iv2_jax.models.decoding import GenerationConfig

logger = logging.getLogger(__name__)

WAYS = ("generate", "likelihood")


@dataclasses.dataclass(frozen=True)
class ChoiceOptions:
    """How questions with options are asked and judged.

    Attributes:
      by: `generate`: the model writes and its reply is parsed, as MVBench does; `likelihood`: the
        option that is likeliest given the clip and the question is chosen.
      prompt: name in `answers_prompts.PROMPTS`.
      parser: of replies, see `answer_parser.is_right`.
      by_length: likelihoods are divided by the options' tokens.
      protocol: see `answers_pixels.ClipViews`.
      statistics: see `answers.Asker`.
      max_new_tokens: of a reply.
      batch_size: questions at a time.
      threads: that read clips.

    Raises:
      ConfigError: a name is not known, or a value does not fit another.
    """

    by: str = "generate"
    prompt: str = "mvbench"
    parser: str = "strict"
    by_length: bool = False
    protocol: str = "run"
    statistics: str = "model"
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = 8
    threads: int = 2

    def __post_init__(self) -> None:
        for name, known in (("by", WAYS), ("parser", PARSERS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {known}")
        get_prompt(self.prompt)
        if self.parser != "strict" and self.by != "generate":
            raise ConfigError(f"parser={self.parser!r} needs by='generate': replies are parsed")
        if self.parser == "released" and "{letter}" not in get_prompt(self.prompt).answer:
            raise ConfigError(f"parser='released' needs letters, prompt {self.prompt!r} has none")
        if self.by_length and self.by != "likelihood":
            raise ConfigError("by_length=True needs by='likelihood'")

    def settings(self, chat: ChatModel) -> dict[str, Any]:
        """What answers depend on."""
        values = {
            "weights": fingerprint(chat.params),
            "talk": config_lib.to_dict(chat.talk),
            "by": self.by,
            "prompt": config_lib.to_dict(get_prompt(self.prompt)),
            "protocol": self.protocol,
            "statistics": self.statistics,
        }
        return values | ({"max_new_tokens": self.max_new_tokens} if self.by == "generate" else {})


@dataclasses.dataclass(frozen=True)
class Score:
    """Figures of some questions.

    Attributes:
      questions: that were asked.
      right: answered right.
      low: lower end of the 95 % interval of the accuracy.
      high: upper end.
      chance: expected share of right answers of a random choice.
      unparsed: replies that choose no option; they count as wrong.
      left_out: questions that could not be asked.
    """

    questions: int
    right: int
    low: float
    high: float
    chance: float
    unparsed: int
    left_out: int

    @property
    def accuracy(self) -> float:
        """Share of right answers; 0 without any question."""
        return self.right / self.questions if self.questions else 0.0


@dataclasses.dataclass
class ChoiceResult:
    """Answers to a set of questions.

    Attributes:
      questions: the set.
      records: one for each question, in the same order: `chosen` place of an option or None,
        `right`, `reply` or `log_probs`, and `reason` where it could not be asked.
      options: how they were asked.
    """

    questions: Sequence[Question]
    records: list[dict[str, Any]]
    options: ChoiceOptions

    def tasks(self) -> dict[str, Score]:
        """Figures of each task, in the set's order."""
        places: dict[str, list[int]] = {}
        for at, question in enumerate(self.questions):
            places.setdefault(question.task, []).append(at)
        return {task: self._score(at) for task, at in places.items()}

    def all(self) -> Score:
        """Figures over all questions, each of which counts the same."""
        return self._score(range(len(self.questions)))

    def mean(self) -> tuple[float, float, float]:
        """Mean of the tasks' accuracies, and its 95 % interval."""
        right: dict[str, list[bool]] = {}
        for question, record in zip(self.questions, self.records, strict=True):
            if not record.get("reason"):
                right.setdefault(question.task, []).append(record["right"])
        values = [np.array(task, np.float64) for task in right.values()]
        if not values:
            return 0.0, 0.0, 1.0
        return float(np.mean([task.mean() for task in values])), *mean_interval(values)

    def unread(self) -> dict[str, str]:
        """Question -> why it could not be asked."""
        return {r["id"]: r["reason"] for r in self.records if r.get("reason")}

    def compare(self, other: ChoiceResult) -> dict[str, PairedResult]:
        """This result against another of the same questions, in order: accuracy, and with
        likelihoods that of the right answer; clips are resampled whole.
        """
        pairs = [
            (question, own, others)
            for question, own, others in zip(
                self.questions, self.records, other.records, strict=True
            )
            if not own.get("reason") and not others.get("reason")
        ]
        groups = [question.medium for question, _, _ in pairs]
        own, others = ([float(pair[i]["right"]) for pair in pairs] for i in (1, 2))
        found = {"accuracy": paired(own, others, groups=groups)}
        if self.options.by == "likelihood" == other.options.by:
            own, others = ([pair[i]["log_probs"][pair[0].number] for pair in pairs] for i in (1, 2))
            found["log_likelihood"] = paired(own, others, groups=groups)
        return found

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        mean, low, high = self.mean()
        return {
            "options": dataclasses.asdict(self.options),
            "all": _figures(self.all()),
            "mean_of_tasks": {"accuracy": mean, "low": low, "high": high},
            "tasks": {task: _figures(score) for task, score in self.tasks().items()},
            "unread": self.unread(),
        }

    def _score(self, places: Sequence[int]) -> Score:
        """Figures of the questions at some places."""
        asked = [at for at in places if not self.records[at].get("reason")]
        right = sum(self.records[at]["right"] for at in asked)
        chance = [_chance(self.questions[at]) for at in asked]
        return Score(
            len(asked),
            right,
            *wilson(right, len(asked)),
            chance=float(np.mean(chance)) if chance else 0.0,
            unparsed=sum(self.records[at]["chosen"] is None for at in asked),
            left_out=len(places) - len(asked),
        )


def evaluate_choices(
    chat: ChatModel,
    questions: Sequence[Question],
    options: ChoiceOptions,
    *,
    answers: str | Path | None = None,
    mesh: Mesh | None = None,
) -> ChoiceResult:
    """Asks all questions, but those whose answers are kept already.

    Args:
      chat: the model.
      questions: with options.
      options: how they are asked and judged.
      answers: file that keeps the answers (JSONL), so that a killed run goes on; None for none.
      mesh: None takes one device.

    Raises:
      ConfigError: the file has answers that were given otherwise, or a question has no options.
    """
    for question in questions:
        if not question.options:
            raise ConfigError(f"question {question.id} has no options to choose from")
    with KeptAnswers(answers, options.settings(chat)) as kept:
        left = [question for question in questions if kept.known(question) is None]
        if len(left) < len(questions):
            logger.info("%d answers of %s are kept", len(questions) - len(left), answers)
        if left:
            asker = Asker.of(chat, options, prompt=options.prompt, mesh=mesh)
            _ask(asker, left, options, kept)
        records = [_judged(q, kept.found[q.id], options) for q in questions]
    for name, reason in {r["id"]: r["reason"] for r in records if r.get("reason")}.items():
        logger.warning("%s was not asked: %s", name, reason)
    return ChoiceResult(questions, records, options)


def _ask(
    asker: Asker, questions: Sequence[Question], options: ChoiceOptions, kept: KeptAnswers
) -> None:
    """Asks and keeps what comes."""
    if options.by == "likelihood":
        found = (
            (at, {"reason": s.reason} if s.reason else _likelihoods(s.log_probs, s.tokens))
            for at, s in asker.score(questions)
        )
    else:
        config = GenerationConfig(max_new_tokens=options.max_new_tokens)
        found = (
            (at, {"reason": r.reason} if r.reason else {"reply": r.text, "ended": r.ended})
            for at, r in asker.answer(questions, config)
        )
    for at, values in tqdm(found, total=len(questions), desc="questions", disable=None):
        kept.add(questions[at], values)


def _likelihoods(log_probs: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """As they are kept."""
    return {"log_probs": log_probs.tolist(), "tokens": tokens.tolist()}


def _judged(question: Question, record: Mapping[str, Any], options: ChoiceOptions) -> dict:
    """A record with what was chosen and whether it is right; other parsers need no new answers."""
    if record.get("reason"):
        return {**record, "chosen": None, "right": False}
    if options.by == "likelihood":
        values = np.array(record["log_probs"])
        values = values / np.array(record["tokens"]) if options.by_length else values
        chosen = int(np.argmax(values))
    else:
        chosen = get_prompt(options.prompt).choice(record["reply"], question.options)
    right = chosen is not None and question.options[chosen] == question.answer
    if options.parser == "released":
        right = is_right(record["reply"], question.options, question.number, parser="released")
    return {**record, "chosen": chosen, "right": bool(right)}


def _chance(question: Question) -> float:
    """Share of options that are right."""
    same = sum(option == question.answer for option in question.options)
    return same / len(question.options)


def _figures(score: Score) -> dict[str, Any]:
    """A score with its accuracy."""
    return {"accuracy": score.accuracy, **dataclasses.asdict(score)}


def table(name: str, result: ChoiceResult) -> str:
    """Figures of every task, then of all, in percent."""
    tasks = result.tasks()
    width = max(len(task) for task in (*tasks, "mean of tasks"))
    head = f"{'questions':>9}  {'accuracy':>8}  {'95 % interval':>14}  {'chance':>6}"
    lines = [name, f"  {'':{width}}  {head}  {'unparsed':>8}  {'left out':>8}"]
    for task, score in (*tasks.items(), ("all", result.all())):
        lines.append(
            f"  {task:{width}}  {score.questions:9d}  {100 * score.accuracy:8.1f}  "
            f"{f'{100 * score.low:.1f} to {100 * score.high:.1f}':>14}  {100 * score.chance:6.1f}"
            f"  {score.unparsed:8d}  {score.left_out:8d}"
        )
    mean, low, high = (100 * value for value in result.mean())
    interval = f"{low:.1f} to {high:.1f}"
    lines.append(f"  {'mean of tasks':{width}}  {len(tasks):9d}  {mean:8.1f}  {interval:>14}")
    return "\n".join(lines)
