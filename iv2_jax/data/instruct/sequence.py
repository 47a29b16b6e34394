"""A conversation as token ids, places of visual tokens and targets (spec stage3 4 and 5).

A conversation is written out with a template (`data.prompts`) in pieces, each of which becomes ids
of its own. What a piece is, is known from where it came from: targets and media are never found
again in tokenized text, and what people typed is never read as a special token.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Iterator, Sequence

import numpy as np

from iv2_jax.data import prompts
from iv2_jax.data.dialogue import IGNORE, Bos, Example
from iv2_jax.data.instruct.conversations import Conversation, Turn
from iv2_jax.data.prompts import Template
from iv2_jax.data.tokenizers.language_model import LlmTokenizer
from iv2_jax.errors import ConfigError, DataError, nearest


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What the released code does otherwise."""

    bos: Bos = Bos.FIRST
    one_turn: bool = False
    one_text: bool = False  # prompts: earlier answers are tokenized with what is around them


# Spec stage3 4.1, 5.3 and traps 1 and 3.
COMPAT = {
    "none": _Rules(),
    "released_tuning": _Rules(Bos.NONE, one_turn=True),
    "released_chat": _Rules(Bos.EVERY_SEGMENT, one_text=True),
}


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """How conversations become sequences.

    Attributes:
      template: name of a `prompts.TEMPLATES`.
      max_length: most positions of a sequence.
      tokens_per_view: K, visual tokens that the bridge gives for a view.
      shuffle_turns: independent turns come in another order at every visit.
      one_turn: a visit shows the first turn alone: with captions, one of them.
      compat: `none`: one token begins the sequence and every answer is a target.
        `released_tuning`: as Chat-8B was tuned, no beginning token and the first turn alone.
        `released_chat`: as its `chat()` writes prompts, a beginning token before every text
        between media.

    Raises:
      ConfigError: a name is not known or a number out of range.
    """

    template: str = "mistral_v3"
    max_length: int = 1024
    tokens_per_view: int = 96
    shuffle_turns: bool = True
    one_turn: bool = False
    compat: str = "none"

    def __post_init__(self) -> None:
        prompts.get_template(self.template)
        if self.compat not in COMPAT:
            raise ConfigError(f"compat {self.compat!r} is not known{nearest(self.compat, COMPAT)}")
        for name, least in (("max_length", 2), ("tokens_per_view", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, is {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Span:
    """Positions that visual tokens of a medium fill.

    Attributes:
      start: first position.
      length: positions, `num_views` times `tokens_per_view`.
      medium: number of the medium in the conversation.
      view: first of the medium's views that stand here.
      num_views: how many stand here.
    """

    start: int
    length: int
    medium: int
    view: int = 0
    num_views: int = 1


@dataclasses.dataclass(frozen=True)
class TokenSequence(Example):
    """A conversation as ids, not padded; `dialogue.pad_batch` takes it too.

    `visual_index` counts rows of the views that stand in the sequence, in their order.

    Attributes:
      spans: where media stand; a medium with tags around each view has a span for each.
      cut: positions that were cut off.
    """

    spans: tuple[Span, ...] = ()
    cut: int = 0

    @property
    def num_targets(self) -> int:
        """Tokens that the loss asks for; the first of a sequence is never scored."""
        return int((self.targets[1:] != IGNORE).sum())

    @property
    def views(self) -> tuple[tuple[int, int], ...]:
        """(medium, view) of every view that stands in the sequence, in order."""
        return tuple((s.medium, s.view + at) for s in self.spans for at in range(s.num_views))


@dataclasses.dataclass(frozen=True)
class _Text:
    """Text that is tokenized in one go: stretches, each with whether a person typed it."""

    parts: list[tuple[str, bool]]
    target: bool = False


@dataclasses.dataclass(frozen=True)
class _Slots:
    """Places of a medium's visual tokens."""

    medium: int
    view: int
    num_views: int


class SequenceBuilder:
    """Turns conversations into sequences; can be pickled.

    Attributes:
      config: how.
      tokenizer: of the language model.
      template: how a chat is written.
    """

    def __init__(self, config: SequenceConfig, tokenizer: LlmTokenizer) -> None:
        """Takes the settings and the language model's tokenizer."""
        self.config = config
        self.tokenizer = tokenizer
        self.template: Template = prompts.get_template(config.template)
        self._rules = COMPAT[config.compat]
        self._one_turn = config.one_turn or self._rules.one_turn

    def visit(
        self, conversation: Conversation, rng: np.random.Generator | None = None
    ) -> Conversation:
        """The conversation as one visit in training shows it: order and number of its turns.

        Args:
          conversation: all of it.
          rng: source of the order of independent turns; None keeps the file's.
        """
        turns = conversation.turns
        if rng is not None and self.config.shuffle_turns and not conversation.ordered:
            turns = tuple(turns[i] for i in rng.permutation(len(turns)))
        if self._one_turn:
            turns = turns[:1]
        return dataclasses.replace(conversation, turns=turns)

    def build(
        self,
        conversation: Conversation,
        num_views: Sequence[int] | None = None,
        *,
        answer_prefix: str = "",
    ) -> TokenSequence:
        """Builds the sequence of a conversation, or a prompt if its last answer is None.

        A sequence longer than `max_length` ends behind the last target within it: what follows,
        the beginning of a medium perhaps, teaches nothing, and no medium is cut in two.

        Args:
          conversation: of `visit`, say.
          num_views: views of each medium; None: one each.
          answer_prefix: first words of the answer to be generated.

        Returns:
          The sequence. Without room for a single target it has none: `num_targets` is 0.

        Raises:
          DataError: the tokenizer does not read the template's stop mark as `eos_id`, or a prompt
            is longer than `max_length`.
        """
        views = [1] * len(conversation.media) if num_views is None else list(num_views)
        if len(views) != len(conversation.media) or min(views, default=1) < 1:
            raise ConfigError(
                f"num_views={views}: {len(conversation.media)} numbers from 1 on are needed"
            )
        is_prompt = conversation.turns[-1].answer is None
        pieces = list(self._write(conversation, views, answer_prefix))
        sequence = self._assemble(_runs(pieces, is_prompt and self._rules.one_text))
        return self._fit(sequence, is_prompt)

    def longest(self, conversation: Conversation, num_views: Sequence[int] | None = None) -> int:
        """Positions that no visit needs more of, cut to `max_length`; 0 if none has a target.

        Exact where turns are tokenized independently of their order, as with control tokens
        around them; else a visit may be longer by a token or two, and is cut.
        """
        instruction = max((turn.instruction for turn in conversation.turns), key=len)
        turns = tuple(
            dataclasses.replace(turn, instruction=instruction) for turn in conversation.turns
        )
        visits = [turns]
        if self._one_turn:
            shuffled = self.config.shuffle_turns and not conversation.ordered
            visits = [(turn,) for turn in (turns if shuffled else turns[:1])]
        built = [
            self.build(dataclasses.replace(conversation, turns=visit), num_views)
            for visit in visits
        ]
        return max((one.length for one in built if one.num_targets), default=0)

    def _write(
        self, conversation: Conversation, views: Sequence[int], answer_prefix: str
    ) -> Iterator[_Text | _Slots]:
        """Writes the conversation out: text that is a target or not, and places of media."""
        form = self.template
        instruction = conversation.turns[0].instruction
        yield _Text(_filled(form.head, instruction=instruction))
        for number in conversation.front:
            yield from self._medium(conversation, number, views[number])
        alone = not conversation.media and form.after_nothing is not None
        after = form.after_nothing if alone else form.after
        yield _Text(_filled(after, message=conversation.message.rstrip()))
        for at, turn in enumerate(conversation.turns):
            yield from self._question(conversation, turn, at, views)
            if turn.answer is not None:
                yield _Text(_filled(form.answer, answer=turn.answer), target=True)
        if answer_prefix:
            yield _Text([(answer_prefix, False)])

    def _question(
        self, conversation: Conversation, turn: Turn, at: int, views: Sequence[int]
    ) -> Iterator[_Text | _Slots]:
        """A question with the media that stand in it."""
        form = self.template.question
        if at and self.template.later_question:
            form = self.template.later_question
        if not turn.question and not turn.media:
            form = self.template.empty_question
        for literal, field in _split(form):
            yield _Text([(literal, False)])
            if field is None:
                continue
            done = 0
            for place, number in turn.media:
                yield _Text([(turn.question[done:place], True)])
                yield from self._medium(conversation, number, views[number])
                done = place
            yield _Text([(turn.question[done:], True)])

    def _medium(
        self, conversation: Conversation, number: int, num_views: int
    ) -> Iterator[_Text | _Slots]:
        """A medium's views between their tags."""
        is_video = conversation.media[number].kind == "video"
        tags = self.template.video_tags if is_video else self.template.image_tags
        each = 1 if self.template.tags_per_view else num_views
        for view in range(0, num_views, each):
            yield _Text([(tags[0], False)])
            yield _Slots(number, view, each)
            yield _Text([(tags[1], False)])

    def _assemble(self, runs: Iterator[_Text | _Slots]) -> TokenSequence:
        """Ids, slots and targets of all runs."""
        tokens: list[int] = []
        visual: list[int] = []
        targets: list[int] = []
        spans: list[Span] = []
        row, begins = 0, self._rules.bos is not Bos.NONE
        for run in runs:
            if isinstance(run, _Slots):
                count = run.num_views * self.config.tokens_per_view
                spans.append(Span(len(tokens), count, run.medium, run.view, run.num_views))
                tokens += [0] * count
                visual += range(row, row + count)
                targets += [IGNORE] * count
                row += count
                begins = begins or self._rules.bos is Bos.EVERY_SEGMENT
                continue
            ids = self._ids(run)
            if begins and ids[:1] != [self.tokenizer.bos_id]:  # which a template may have itself
                ids, target = [self.tokenizer.bos_id, *ids], [IGNORE]
            else:
                target = []
            begins = False
            target += ids[len(target) :] if run.target else [IGNORE] * (len(ids) - len(target))
            tokens += ids
            visual += [-1] * len(ids)
            targets += target
        arrays = (np.asarray(values, np.int32) for values in (tokens, visual, targets))
        return TokenSequence(*arrays, spans=tuple(spans))

    def _ids(self, run: _Text) -> list[int]:
        """Ids of a text; those of an answer must end with the stop mark."""
        parts = _stripped(run.parts) if self.template.strip else run.parts
        ids = self.tokenizer.tokenize_parts(parts)
        if run.target and (not ids or ids[-1] != self.tokenizer.eos_id):
            raise DataError(
                f"the tokenizer gives {ids[-4:]} for the end of an answer, {run.parts[-1][0]!r} of "
                f"template {self.config.template!r}, not eos_id={self.tokenizer.eos_id}: choose "
                "the template of this language model"
            )
        return ids

    def _fit(self, sequence: TokenSequence, is_prompt: bool) -> TokenSequence:
        """Cuts a sequence to `max_length`; refuses a prompt that is longer."""
        if is_prompt and sequence.length > self.config.max_length:
            raise DataError(
                f"the prompt has {sequence.length} positions, max_length={self.config.max_length} "
                "fewer: ask less at once, drop earlier turns or show fewer views"
            )
        return cut(sequence, self.config.max_length)


def cut(sequence: TokenSequence, length: int) -> TokenSequence:
    """Cuts a sequence behind the last target within a length, which is never within a medium."""
    if sequence.length <= length:
        return sequence
    # Between two targets a medium is whole, so an end behind a target splits none.
    wanted = np.flatnonzero(sequence.targets[:length] != IGNORE)
    end = int(wanted[-1]) + 1 if len(wanted) else 0
    return TokenSequence(
        sequence.tokens[:end],
        sequence.visual_index[:end],
        sequence.targets[:end],
        spans=tuple(span for span in sequence.spans if span.start < end),
        cut=sequence.cut + sequence.length - end,
    )


def _split(form: str) -> Iterator[tuple[str, str | None]]:
    """(text, field after it or None) of a template's string."""
    for literal, field, _, _ in string.Formatter().parse(form):
        yield literal, field


def _filled(form: str, **values: str) -> list[tuple[str, bool]]:
    """A template's string with its fields filled, as parts: what people typed is marked."""
    parts = []
    for literal, field in _split(form):
        parts.append((literal, False))
        if field is not None:
            parts.append((values[field], True))
    return parts


def _runs(pieces: Sequence[_Text | _Slots], one_text: bool) -> Iterator[_Text | _Slots]:
    """Joins neighbouring texts that are no targets; drops empty ones.

    With `one_text` nothing is a target, so that all text between media is joined.
    """
    run: _Text | None = None
    for piece in pieces:
        if isinstance(piece, _Slots):
            if run is not None:
                yield run
            run = None
            yield piece
            continue
        parts = [part for part in piece.parts if part[0]]
        target = piece.target and not one_text
        if not parts:
            continue
        if run is not None and not (run.target or target):
            run.parts.extend(parts)
            continue
        if run is not None:
            yield run
        run = _Text(parts, target)
    if run is not None:
        yield run


def _stripped(parts: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Parts without the white space at their two ends."""
    out = list(parts)
    while out and not out[0][0].strip():
        out.pop(0)
    while out and not out[-1][0].strip():
        out.pop()
    if out:
        out[0] = (out[0][0].lstrip(), out[0][1])
        out[-1] = (out[-1][0].rstrip(), out[-1][1])
    return out
