"""Dialogues about a clip and how language models' chats write them down (spec stage3 4).

A dialogue becomes pieces: text, each either asked for by the loss or not, and the places of the
visual tokens of a view. `dialogue` turns pieces into ids. Plain Python.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from iv2_jax.errors import ConfigError, DataError, nearest


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        question: what is asked; empty where the instruction asks already (captions).
        answer: the reply; None for the one to be generated, which must be the last.
    """

    question: str
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """What is said about one clip, image or nothing.

    Attributes:
        turns: questions and answers in order.
        instruction: sentence on the task that precedes everything.
        media: 'video', 'image' or 'none'.
        num_views: views of the medium (tiles and the global view of high-definition input).
        message: sentence after the medium, such as `frames_message`.
    """

    turns: tuple[Turn, ...]
    instruction: str = ""
    media: str = "video"
    num_views: int = 1
    message: str = ""

    def __post_init__(self) -> None:
        if self.media not in ("video", "image", "none"):
            raise ConfigError(f"media={self.media!r}: choose one of video, image, none")
        if self.num_views < 1:
            raise ConfigError(f"num_views={self.num_views}: at least 1 is needed")
        if not self.turns:
            raise DataError("a dialogue needs at least one turn")
        if any(turn.answer is None for turn in self.turns[:-1]):
            raise DataError("only the last turn of a dialogue may be without an answer")


@dataclasses.dataclass(frozen=True)
class Template:
    """How a language model's chat is written; `{}` fields are filled from the dialogue.

    Attributes:
        head: up to the opening tag of the medium; has `{instruction}`.
        after: from the closing tag of the medium on; has `{message}`.
        question: has `{question}`.
        answer: has `{answer}`; ends with what makes the model stop.
        empty_question: stands for an empty question.
        later_question: for all turns but the first; None is the same as `question`.
        video_tags: opening and closing tag of a video.
        image_tags: opening and closing tag of an image.
        tags_per_view: a pair of tags around each view, else one pair around all of them.
        strip: the tokenizer puts the space before a piece itself, as plain SentencePiece does, so
            pieces are encoded without the spaces around them.
    """

    head: str
    after: str
    question: str
    answer: str
    empty_question: str = ""
    later_question: str | None = None
    video_tags: tuple[str, str] = ("<Video>", "</Video>")
    image_tags: tuple[str, str] = ("<Image>", "</Image>")
    tags_per_view: bool = True
    strip: bool = False


# Spec stage3 4.1, 4.2, 5.3.
TEMPLATES = {
    # InternVideo2-Chat on Mistral v0.3, as its `chat()` and the high-definition training write.
    "mistral_v3": Template(
        head="{instruction}[INST] ",
        after="{message}[/INST]",
        question=" [INST] {question} [/INST]",
        answer="{answer}</s>",
    ),
    # The same model's instruction tuning at 224 pixels: a space after every question.
    "mistral_v3_tuning": Template(
        head="{instruction}[INST] ",
        after="{message}[/INST]",
        question=" [INST] {question} [/INST] ",
        answer="{answer}</s>",
        empty_question=" ",
    ),
    # Its caption alignment.
    "mistral_v3_caption": Template(
        head="<s>[INST] ", after=" [/INST] ", question="{question}", answer="{answer}</s>"
    ),
    # VideoChat2 on Mistral v0.2.
    "mistral_v2": Template(
        head="{instruction} [INST] ",
        after="{message} [/INST]",
        question=" [INST] {question} [/INST]",
        answer=" {answer} </s>",
        tags_per_view=False,
        strip=True,
    ),
    # InternVideo2-Chat on InternLM2.5: two turns of the user in a row.
    "internlm2_5": Template(
        head="<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n",
        after="{message}<|im_end|>\n",
        question="<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        answer="{answer}<|im_end|>\n</s>",
        empty_question="<|im_start|>assistant\n",
        video_tags=("<vid>", "</vid>"),
        image_tags=("<img>", "</img>"),
    ),
    # VideoChat2 on Phi-3: the medium sits in the user's first turn.
    "phi3": Template(
        head="{instruction}<|user|>\n",
        after="{message}\n",
        question="{question}<|end|>\n<|assistant|>\n",
        answer="{answer}<|end|>\n",
        empty_question="<|end|>\n<|assistant|>\n",
        later_question="<|user|>\n{question}<|end|>\n<|assistant|>\n",
        tags_per_view=False,
    ),
}


def get_template(name: str) -> Template:
    """Looks a template up by name.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest one.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"no chat template is named {name!r}{nearest(name, TEMPLATES)}")
    return TEMPLATES[name]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a dialogue.

    Attributes:
        text: the text; empty for visual tokens.
        target: whether the loss asks for it.
        num_views: views whose visual tokens stand here; 0 for text.
    """

    text: str
    target: bool = False
    num_views: int = 0


def pieces(dialogue: Dialogue, template: Template, answer_prefix: str = "") -> list[Piece]:
    """Writes a dialogue out. Every answer is a target (spec stage3 5.2, 5.4).

    Released instruction tuning of Chat-8B trained the first turn only: give it `turns[:1]`
    (spec stage3 5.3).

    Args:
        dialogue: what is said.
        template: how it is written.
        answer_prefix: first words of the answer to be generated (`Best option:(`).

    Returns:
        Text and media pieces in order.
    """
    head = template.head.format(instruction=dialogue.instruction)
    after = template.after.format(message=dialogue.message.rstrip())
    if dialogue.media == "none":
        out = [Piece(head + after)]
    else:
        tags = template.video_tags if dialogue.media == "video" else template.image_tags
        repeats, views = (1, dialogue.num_views)
        if template.tags_per_view:
            repeats, views = views, repeats
        out = [Piece(head)]
        for _ in range(repeats):
            out += [Piece(tags[0]), Piece("", num_views=views), Piece(tags[1])]
        out.append(Piece(after))
    for index, turn in enumerate(dialogue.turns):
        form = template.later_question if index and template.later_question else template.question
        if not turn.question:
            form = template.empty_question
        out.append(Piece(form.format(question=turn.question)))
        if turn.answer is not None:
            out.append(Piece(template.answer.format(answer=turn.answer), target=True))
    if answer_prefix:
        out.append(Piece(answer_prefix))
    return out


def render(dialogue: Dialogue, template: Template, *, slot: str = "") -> str:
    """The dialogue as one string, `slot` standing for each view's visual tokens."""
    parts = (p.text or slot * p.num_views for p in pieces(dialogue, template))
    text = "".join(parts)
    return text.strip() if template.strip else text


class BridgeText(enum.Enum):
    """What the bridge is told of the task (spec stage3 2.4)."""

    NONE = "none"  # released inference
    INSTRUCTION = "instruction"  # released training
    INSTRUCTION_AND_QUESTION = "instruction+question"


def bridge_text(dialogue: Dialogue, mode: BridgeText) -> str | None:
    """Text for the Q-Former: None gives it none, which is not the same as an empty one."""
    if mode is BridgeText.NONE:
        return None
    if mode is BridgeText.INSTRUCTION:
        return dialogue.instruction
    return f"{dialogue.instruction} {dialogue.turns[0].question}".strip()


def frames_message(seconds: Sequence[float]) -> str:
    """Sentence on when the frames were taken, for `Dialogue.message` (spec stage3 4.3)."""
    times = ", ".join(str(round(float(second), 1)) for second in seconds)
    return f" The video contains {len(seconds)} frames sampled at {times} seconds. "
