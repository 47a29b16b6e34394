"""Questions about clips, and how they are put to a chat model (spec stage3 11.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from iv2_jax.data.dialogue import IGNORE
from iv2_jax.data.instruct.batches import bridge_text
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn
from iv2_jax.data.instruct.sequence import COMPAT, SequenceBuilder, TokenSequence
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.prompts import BridgeText, Template
from iv2_jax.errors import ConfigError, DataError, nearest
from iv2_jax.eval.answer_parser import letter, parse_choice

# Verbatim, as the scores follow from it.
_MVBENCH_INSTRUCTION = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question.\n"
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a clip.

    Attributes:
      id: name, unlike all others of its set.
      text: what is asked.
      answer: the right answer; of a question with options, one of them.
      options: what may be answered, 26 at most; empty for an open question.
      medium: the clip; None asks about nothing.
      task: what figures are given for apart.
      instruction: sentence on the task; empty takes the prompt's or the model's.
    """

    id: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    medium: Medium | None = None
    task: str = ""
    instruction: str = ""

    def __post_init__(self) -> None:
        if self.options and self.answer not in self.options:
            raise DataError(f"{self.id}: answer {self.answer!r} is none of {list(self.options)}")
        if len(self.options) > 26:
            raise DataError(f"{self.id}: {len(self.options)} options; there are 26 letters")

    @property
    def number(self) -> int:
        """Place of the right option; the first where several have its text."""
        return self.options.index(self.answer)


@dataclasses.dataclass(frozen=True)
class AnswerPrompt:
    """How a question is put.

    Attributes:
      question: what the user says: `{question}`, `{options}`, `{instruction}`.
      instruction: sentence on the task; empty takes the question's, else the model's.
      option: a line of the options: `{letter}`, `{text}`.
      answer_prefix: first words of the answer, which the model is given.
      answer: how an option is said behind the prefix: `{letter}`, `{text}`.
      scored: what the likelihood of an option is that of: its `answer`, with what ends it, or the
        `letter`, the first token in which the options' answers differ.
      capital: the question begins with a capital letter.

    Raises:
      ConfigError: `scored` is not known.
    """

    question: str = "{question}"
    instruction: str = ""
    option: str = "({letter}) {text}"
    answer_prefix: str = ""
    answer: str = "{text}"
    scored: str = "answer"
    capital: bool = False

    def __post_init__(self) -> None:
        if self.scored not in ("answer", "letter"):
            raise ConfigError(f"scored={self.scored!r}: choose 'answer' or 'letter'")

    def conversation(self, question: Question, answer: str | None = None) -> Conversation:
        """The question as a conversation of one turn; its answer None for a prompt."""
        instruction = self.instruction or question.instruction
        text = question.text
        if self.capital:
            text = text[:1].upper() + text[1:]
        lines = (
            self.option.format(letter=letter(i), text=option)
            for i, option in enumerate(question.options)
        )
        asked = self.question.format(
            question=text, options="\n".join(lines), instruction=instruction
        )
        media = () if question.medium is None else (question.medium,)
        return Conversation((Turn(asked, answer, instruction),), media, id=question.id)

    def said(self, question: Question, option: int) -> str:
        """An option as an answer, with the prefix."""
        text = self.answer.format(letter=letter(option), text=question.options[option])
        return self.answer_prefix + text

    def choice(self, reply: str, options: tuple[str, ...]) -> int | None:
        """The option that a generated reply chooses, by the strict rule."""
        if "{letter}" in self.answer:
            return parse_choice(reply, options)
        return parse_choice(reply, options, accept_text=True, accept_letter=False)


_OPTIONS = "Question: {question}\nOptions:\n{options}\nOnly give the best option."
_LETTERS = {"answer_prefix": "Best option:(", "answer": "{letter}) {text}", "scored": "letter"}

PROMPTS = {
    # The question alone; an option is what would be answered.
    "open": AnswerPrompt(),
    # The options in the question, and the model's own instruction.
    "options": AnswerPrompt(_OPTIONS, **_LETTERS),
    "mvbench": AnswerPrompt("{instruction}" + _OPTIONS, _MVBENCH_INSTRUCTION, **_LETTERS),
    # EgoSchema's evaluation does not say the instruction twice (spec stage3 11.2).
    "egoschema": AnswerPrompt(_OPTIONS, _MVBENCH_INSTRUCTION, capital=True, **_LETTERS),
}


def get_prompt(name: str) -> AnswerPrompt:
    """Looks a prompt up.

    Raises:
      ConfigError: there is none of this name.
    """
    if name not in PROMPTS:
        raise ConfigError(f"no prompt is named {name!r}{nearest(name, PROMPTS)}")
    return PROMPTS[name]


@dataclasses.dataclass(frozen=True)
class Target:
    """An option's answer as a sequence, and what of it is scored.

    Attributes:
      sequence: prompt and answer.
      places: int `(S,)` positions whose tokens are scored.
    """

    sequence: TokenSequence
    places: np.ndarray


class Writer:
    """Writes questions as token sequences."""

    def __init__(self, builder: SequenceBuilder, talk: TalkConfig, prompt: AnswerPrompt) -> None:
        """Takes what turns conversations into sequences, and how questions are put."""
        self._builder, self._talk, self.prompt = builder, talk, prompt

    def prompt_of(self, question: Question, num_views: int) -> TokenSequence:
        """The prompt of a question, up to the answer prefix.

        The prefix has the ids that it has in an answer that is learnt; as the released `chat()`
        writes prompts (`compat="released_chat"`), those of one text with what stands before it.

        Raises:
          DataError: it is longer than the model's sequences.
        """
        prefix = self.prompt.answer_prefix
        if prefix and question.options and not COMPAT[self._builder.config.compat].one_text:
            bare = self._answered(question, num_views, prefix)
            said = [self.prompt.said(question, i) for i in range(len(question.options))]
            written = [self._answered(question, num_views, answer).tokens for answer in said]
            return _beginning(bare, min(_shared([bare.tokens, row]) for row in written))
        views = [num_views] if question.medium else []
        # What a template writes in front of an answer stands in front of its beginning, too.
        prefix = _lead(self._builder.template) + prefix if prefix else ""
        return self._builder.build(self._conversation(question), views, answer_prefix=prefix)

    def targets(self, question: Question, num_views: int) -> list[Target]:
        """The sequences of all options, each as it would be learnt.

        Raises:
          DataError: one is longer than the model's sequences.
        """
        said = [self.prompt.said(question, i) for i in range(len(question.options))]
        written = [self._answered(question, num_views, answer) for answer in said]
        if self.prompt.scored == "letter" and len(set(said)) > 1:
            start = _shared([s.tokens for s in written])
            return [Target(s, np.array([start])) for s in written]
        bare = self._answered(question, num_views, self.prompt.answer_prefix)
        found = []
        for sequence in written:
            first = int(np.argmax(sequence.targets >= 0))
            start = max(first, _shared([sequence.tokens, bare.tokens]))
            found.append(Target(sequence, np.arange(start, sequence.length)))
        return found

    def bridge_text(self, question: Question, mode: BridgeText) -> str:
        """What the Q-Former is told of a question."""
        return bridge_text(self._conversation(question), mode) or ""

    def _answered(self, question: Question, num_views: int, answer: str) -> TokenSequence:
        """The sequence of a question with an answer, whole."""
        views = [num_views] if question.medium else []
        sequence = self._builder.build(self._conversation(question, answer), views)
        if sequence.cut or not sequence.length:
            raise DataError(
                f"question and answer have more than max_length={self._builder.config.max_length} "
                "positions"
            )
        return sequence

    def _conversation(self, question: Question, answer: str | None = None) -> Conversation:
        """The question as a conversation with an instruction."""
        return self._talk.instructed(self.prompt.conversation(question, answer))


def stop_ids(builder: SequenceBuilder) -> tuple[int, ...]:
    """Ids that end an answer: the end of a sequence, and special tokens behind an answer."""
    tokenizer = builder.tokenizer
    tail = builder.template.answer.partition("{answer}")[2]
    special = set(tokenizer.specials.values())
    behind = [i for i in tokenizer.tokenize(tail) if i in special]
    return tuple(dict.fromkeys([tokenizer.eos_id, *behind]))


def _beginning(sequence: TokenSequence, length: int) -> TokenSequence:
    """The first positions of a sequence, as a prompt."""
    return TokenSequence(
        sequence.tokens[:length],
        sequence.visual_index[:length],
        np.full(length, IGNORE, np.int32),
        spans=sequence.spans,
    )


def _lead(template: Template) -> str:
    """What a template writes in front of an answer."""
    return template.answer.partition("{answer}")[0]


def _shared(rows: list[np.ndarray]) -> int:
    """Positions from the beginning that all sequences have in common."""
    return next(_differing(rows), min(len(row) for row in rows))


def _differing(rows: list[np.ndarray]) -> Iterator[int]:
    """Positions at which the sequences differ."""
    for at, tokens in enumerate(zip(*rows, strict=False)):
        if len(set(tokens)) > 1:
            yield at
