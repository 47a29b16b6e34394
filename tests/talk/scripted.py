"""A model that says what it was given to say: for the terminal and the page, without weights."""

from __future__ import annotations

import dataclasses
import time

from iv2_jax.data.instruct.sequence import SequenceBuilder, SequenceConfig
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.talk.model import TalkModel
from tests.data.instruct.words import Letters


class Quiet(Letters):
    """Letters that leaves special tokens out of texts, as real tokenizers do."""

    def decode(self, ids):
        return super().decode([index for index in ids if index >= 100])


class Scripted(TalkModel):
    """Answers from a list, letter by letter; remembers prompts and what was encoded.

    Attributes:
      answers: texts to give, one after the other; the last again and again.
      pause: seconds between letters.
      prompts: token sequences that were answered.
      encoded: (path, what the Q-Former was told) of clips that were encoded.
    """

    def __init__(self, *answers: str, context: int = 400, pause: float = 0.0, **talk: object):
        self.name, self.context, self.pause = "runs/scripted", context, pause
        sequence = SequenceConfig("mistral_v3", 1 << 20, tokens_per_view=2)
        self.talk = dataclasses.replace(
            TalkConfig("letters", sequence, frames=4, size=28, instruction="Watch."), **talk
        )
        self.builder = SequenceBuilder(self.talk.sequence, Quiet())
        self.answers, self.eos_ids = list(answers), (2,)
        self.prompts, self.encoded = [], []

    def is_compiled(self, sequence, options):
        return bool(self.prompts)

    def told(self, conversation):
        return None

    def visual_tokens(self, clip, told):
        self.encoded.append((clip.path, told))
        return len(self.encoded)

    def stream(self, sequence, visual, options, rng, *, chunk=2):
        self.prompts.append(sequence)
        text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        ids = [*self.tokenizer.tokenize_plain(text), 2][: options.max_tokens]
        for at in range(0, len(ids), chunk):
            time.sleep(self.pause)
            yield ids[at : at + chunk]

    def prompt(self, number: int = -1) -> str:
        """A prompt as text, `#` for visual tokens."""
        built = self.prompts[number]
        return "".join(
            "#" if index >= 0 else Letters().decode([token])
            for token, index in zip(built.tokens, built.visual_index, strict=True)
        )
