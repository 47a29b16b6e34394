"""Open questions of conversation files, answered, beside their reference answers."""

from __future__ import annotations

import dataclasses
import logging
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from tqdm import tqdm

from iv2_jax import config as config_lib
from iv2_jax.data.instruct import formats
from iv2_jax.errors import DataError
from iv2_jax.eval.answers import Asker
from iv2_jax.eval.answers_kept import KeptAnswers, fingerprint
from iv2_jax.eval.answers_prompts import Question, get_prompt
from iv2_jax.eval.answers_stats import wilson
from iv2_jax.eval.chat_runs import ChatModel
from iv2_jax.models.decoding import GenerationConfig

logger = logging.getLogger(__name__)

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS = str.maketrans(dict.fromkeys(string.punctuation, " "))


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How open questions are asked.

    Attributes:
      max_new_tokens: of a reply.
      protocol: see `answers_pixels.ClipViews`.
      statistics: see `answers.Asker`.
      batch_size: questions at a time.
      threads: that read clips.
    """

    max_new_tokens: int = 100
    protocol: str = "run"
    statistics: str = "model"
    batch_size: int = 8
    threads: int = 2


def read_open(
    path: str, videos: str | None = None, *, format: str = "auto", missing: str = "error"
) -> tuple[list[Question], int]:
    """Reads a conversation file as questions, each asked alone.

    Args:
      path: VideoChat2-IT, LLaVA or our own file, see `data.instruct.formats`.
      videos: folder that clips are looked for in; None: by what is there.
      format: one of `formats.FORMATS`, or `auto`.
      missing: see `formats.read`.

    Returns:
      The questions, and how many turns were passed over: those that refer to earlier ones, and
      those of conversations about several files.

    Raises:
      DataError: the file cannot be used, or no question is left.
    """
    found: list[Question] = []
    passed = 0
    for number, conversation in enumerate(
        formats.read(path, format=format, root=videos, missing=missing), start=1
    ):
        turns = conversation.turns
        if len(conversation.media) > 1:
            passed += len(turns)
            continue
        if conversation.ordered:
            passed += len(turns) - 1
            turns = turns[:1]
        for at, turn in enumerate(turns):
            found.append(
                Question(
                    id=f"{number}.{at + 1}:{conversation.id}",
                    text=turn.question,
                    answer=turn.answer or "",
                    medium=conversation.media[0] if conversation.media else None,
                    task=Path(path).stem,
                    instruction=turn.instruction,
                )
            )
    if not found:
        raise DataError(f"{path}: has no question that can be asked alone")
    return found, passed


def normalized(text: str) -> str:
    """A text without case, marks, articles and doubled space."""
    return " ".join(_ARTICLES.sub(" ", text.casefold().translate(_MARKS)).split())


def matches(reply: str, answer: str) -> dict[str, bool]:
    """Whether a reply is the answer, and whether it contains it as whole words."""
    said, right = normalized(reply), normalized(answer)
    return {"exact": said == right != "", "contains": bool(right) and f" {right} " in f" {said} "}


def evaluate_answers(
    chat: ChatModel,
    questions: Sequence[Question],
    options: AnswerOptions,
    *,
    answers: str | Path | None = None,
    mesh: Mesh | None = None,
) -> list[dict[str, Any]]:
    """Answers all questions, but those whose answers are kept already.

    Args:
      chat: the model.
      questions: open ones.
      options: how they are asked.
      answers: file that keeps the answers (JSONL), so that a killed run goes on; None for none.
      mesh: None takes one device.

    Returns:
      A record for each question, in their order: `reply`, `exact`, `contains`, or `reason` where
      it could not be asked.

    Raises:
      ConfigError: the file has answers that were given otherwise.
    """
    settings = {
        "weights": fingerprint(chat.params),
        "talk": config_lib.to_dict(chat.talk),
        "prompt": config_lib.to_dict(get_prompt("open")),
        "protocol": options.protocol,
        "statistics": options.statistics,
        "max_new_tokens": options.max_new_tokens,
    }
    with KeptAnswers(answers, settings) as kept:
        left = [question for question in questions if kept.known(question) is None]
        if left:
            asker = Asker.of(chat, options, prompt="open", mesh=mesh)
            replies = asker.answer(left, GenerationConfig(max_new_tokens=options.max_new_tokens))
            for at, reply in tqdm(replies, total=len(left), desc="questions", disable=None):
                values = {"reply": reply.text, "ended": reply.ended}
                values |= matches(reply.text, left[at].answer)
                kept.add(left[at], {"reason": reply.reason} if reply.reason else values)
        return [kept.found[question.id] for question in questions]


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of exact and of containing replies with their 95 % intervals."""
    asked = [record for record in records if not record.get("reason")]
    found: dict[str, Any] = {"questions": len(asked), "left_out": len(records) - len(asked)}
    for name in ("exact", "contains"):
        right = sum(record[name] for record in asked)
        low, high = wilson(right, len(asked))
        found[name] = {"share": right / max(len(asked), 1), "low": low, "high": high}
    return found
