"""One conversation about one clip: its history, what fits the context, and answers as they come."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterator

import jax

from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn
from iv2_jax.data.instruct.sequence import TokenSequence
from iv2_jax.data.tokenizers.text_stream import TextStream
from iv2_jax.errors import DataError
from iv2_jax.talk.clip import SeenClip, see
from iv2_jax.talk.model import AnswerOptions, TalkModel


@dataclasses.dataclass
class Answer:
    """An answer that is being written: iterate once for its text, piece by piece.

    Attributes:
      notes: sentences for the user on what was done to the conversation to answer.
      compiles: a program is compiled first, which takes from seconds to a minute.
      text: what came so far; all of it once the iterator has ended or was closed.
      tokens: how many tokens that took, the ending one included.
      end: why it ended: `done`, `length` (the most tokens) or `stopped`; empty while it is written.
    """

    pieces: Iterator[str] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    compiles: bool = False
    text: str = ""
    tokens: int = 0
    end: str = ""

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces or ())

    def stop(self) -> None:
        """Ends it where it is; what came so far stays in the history."""
        if self.pieces is not None:
            self.pieces.close()


class ChatSession:
    """A conversation; sessions of one model know nothing of each other.

    Attributes:
      model: who answers.
      options: how, unless `ask` is told otherwise.
      clip: what is talked about; None for text alone.
      turns: questions with their answers, those that were left out for room not among them.
    """

    def __init__(self, model: TalkModel, options: AnswerOptions | None = None) -> None:
        """Begins without a clip."""
        self.model = model
        self.options = options or AnswerOptions()
        self.clip: SeenClip | None = None
        self.turns: list[Turn] = []
        self._asked = 0
        self._visual: dict[str | None, jax.Array] = {}

    def show(self, path: str) -> SeenClip:
        """Looks at a clip and begins anew; nothing changes if it cannot be read.

        Raises:
          DecodeError: it is missing, corrupt or has no pictures.
        """
        clip = see(path, self.model.talk)
        self.clip, self._visual = clip, {}
        self.clear()
        return clip

    def fresh(self) -> ChatSession:
        """A new conversation about the same clip, which is not encoded again."""
        session = ChatSession(self.model, self.options)
        session.clip, session._visual = self.clip, self._visual
        return session

    def clear(self) -> None:
        """Forgets what was said; the clip stays."""
        self.turns, self._asked = [], 0

    def ask(self, question: str, options: AnswerOptions | None = None) -> Answer:
        """Begins an answer; it is written, and becomes history, while it is iterated over.

        What is typed is never read as a special token. Earliest turns that no longer fit the
        context together with the longest answer are left out, and a note says so.

        Args:
          question: any text; control characters but line feeds and tabs are taken out.
          options: how to answer; the session's by default.

        Raises:
          DataError: the question is empty, or does not fit the context even alone.
        """
        options = options or self.options
        question = printable(question).strip()
        if not question:
            raise DataError("the question is empty: type what you want to know")
        if options.max_tokens >= self.model.context:
            raise DataError(
                f"an answer of {options.max_tokens} tokens leaves no room for a question in a "
                f"context of {self.model.context}; give a smaller --max-tokens"
            )
        kept, sequence, conversation = self._fit(question, self.model.context - options.max_tokens)
        answer = Answer(compiles=not self.model.is_compiled(sequence, options))
        if left_out := len(self.turns) - len(kept):
            turns = "turn was" if left_out == 1 else f"{left_out} turns were"
            answer.notes.append(
                f"the earliest {turns} left out: the conversation is longer than the context of "
                f"{self.model.context} tokens"
            )
        answer.pieces = self._write(answer, question, kept, sequence, conversation, options)
        return answer

    def _fit(self, question: str, room: int) -> tuple[list[Turn], TokenSequence, Conversation]:
        """The latest turns that fit with a question, and the prompt of them."""
        kept = list(self.turns)
        while True:
            conversation = self._conversation([*kept, Turn(question, None)])
            sequence = self.model.builder.build(conversation, self._num_views())
            if sequence.length <= room:
                return kept, sequence, conversation
            if not kept:
                break
            kept.pop(0)
        visual = int((sequence.visual_index >= 0).sum())
        shown = f", {visual} of them for the clip" if visual else ""
        raise DataError(
            f"the question is too long: it needs {sequence.length} positions{shown}, and the "
            f"context of {self.model.context} has {room} beside the answer; ask less at once"
        )

    def _conversation(self, turns: list[Turn]) -> Conversation:
        """Turns with the clip in front."""
        clip = self.clip
        media = () if clip is None else (Medium(clip.kind, clip.path),)
        return self.model.talk.instructed(Conversation(tuple(turns), media, ordered=True))

    def _num_views(self) -> list[int]:
        return [] if self.clip is None else [len(self.clip.views)]

    def _write(
        self,
        answer: Answer,
        question: str,
        kept: list[Turn],
        sequence: TokenSequence,
        conversation: Conversation,
        options: AnswerOptions,
    ) -> Iterator[str]:
        """Generates; records the turn however it ends."""
        key = jax.random.fold_in(jax.random.key(options.seed), self._asked)
        text, ids = TextStream(self.model.tokenizer), []
        visual = self._visual_tokens(conversation)
        answer.end = "stopped"
        try:
            for new in self.model.stream(sequence, visual, options, key):
                ids += new
                # A model's table may have more rows than the vocabulary; those have no text.
                piece = text.push([i for i in new if i < self.model.tokenizer.vocab_size])
                piece = piece if answer.text else piece.lstrip()
                if piece:
                    answer.text += piece
                    answer.tokens = len(ids)
                    yield piece
            rest = text.close()
            answer.end = "done" if ids and ids[-1] in self.model.eos_ids else "length"
            if rest.strip():
                answer.text += rest
                yield rest
        finally:
            answer.tokens = len(ids)
            answer.text = answer.text.rstrip()
            self._asked += 1
            self.turns = [*kept, Turn(question, answer.text)]

    def _visual_tokens(self, conversation: Conversation) -> jax.Array | None:
        """The clip's visual tokens, made once for each thing that the Q-Former is told."""
        if self.clip is None:
            return None
        told = self.model.told(conversation)
        if told not in self._visual:
            self._visual = {told: self.model.visual_tokens(self.clip, told)}
        return self._visual[told]


def printable(text: str) -> str:
    """A text without control characters, but line feeds and tabs, and without halves of letters."""
    text = text.encode("utf-8", "ignore").decode("utf-8")
    shown = (c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    return "".join(shown)
