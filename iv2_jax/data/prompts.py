"""How language models' chats are written down (spec stage3 4).

`instruct.sequence.SequenceBuilder` fills a template with a conversation. Plain Python.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from iv2_jax.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Template:
    """How a language model's chat is written; `{}` fields are filled from the conversation.

    Attributes:
        head: up to the opening tag of the medium; has `{instruction}`.
        after: from the closing tag of the medium on; has `{message}`.
        question: has `{question}`.
        answer: has `{answer}`; ends with what makes the model stop.
        empty_question: stands for an empty question.
        later_question: for all turns but the first; None is the same as `question`.
        after_nothing: stands for `after` where there is no medium; None is the same as `after`.
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
    after_nothing: str | None = None
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
    # ChatML as SmolLM2-Instruct and its likes write it, the medium in the user's first turn. An
    # answer ends with the mark itself, so that it is what the model learns to stop with.
    "chatml": Template(
        head="<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n",
        after="{message}\n",
        question="{question}<|im_end|>\n<|im_start|>assistant\n",
        answer="{answer}<|im_end|>",
        empty_question="<|im_end|>\n<|im_start|>assistant\n",
        later_question="\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        after_nothing="",  # text alone is as the language model knows it, to the letter
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


class BridgeText(enum.Enum):
    """What the bridge is told of the task (spec stage3 2.4)."""

    NONE = "none"  # released inference
    INSTRUCTION = "instruction"  # released training
    INSTRUCTION_AND_QUESTION = "instruction+question"


def frames_message(seconds: Sequence[float]) -> str:
    """Sentence on when the frames were taken, for `Conversation.message` (spec stage3 4.3)."""
    times = ", ".join(str(round(float(second), 1)) for second in seconds)
    return f" The video contains {len(seconds)} frames sampled at {times} seconds. "
