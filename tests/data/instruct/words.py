"""A tokenizer of letters and marks, and conversations, for the tests of instruction data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from iv2_jax.data import tokenizers
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn
from iv2_jax.data.tokenizers.language_model import LlmTokenizer


class Letters(LlmTokenizer):
    """Every letter is a token, special tokens are one each, and nothing is put in front."""

    MARKS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|end|>")

    def __init__(self):
        self.specials = {mark: index for index, mark in enumerate(self.MARKS)}
        self.bos_id, self.eos_id = 1, 2
        super().__init__(max_length=4096, vocab_size=1 << 21, pad_id=0)

    def _ids(self, text):
        ids = []
        while text:
            mark = next((m for m in self.MARKS if text.startswith(m)), None)
            ids.append(self.specials[mark] if mark else 100 + ord(text[0]))
            text = text[len(mark) if mark else 1 :]
        return ids

    def decode(self, ids):
        return "".join(self.MARKS[i] if i < 100 else chr(i - 100) for i in map(int, ids))


class Words(LlmTokenizer):
    """Words hashed to the few ids of a tiny model; `</s>` is the one special token."""

    def __init__(self):
        self.specials = {"</s>": 2}
        self.bos_id, self.eos_id = 1, 2
        super().__init__(max_length=4096, vocab_size=55, pad_id=0)

    def _ids(self, text):
        words = text.replace("</s>", " </s>").split()
        return [self.specials.get(word, 5 + sum(map(ord, word)) % 50) for word in words]

    def decode(self, ids):
        return " ".join(f"w{int(index)}" for index in ids if index > 2)


def mistral_file():
    """The real vocabulary of Mistral v0.3, a SentencePiece file; or a skip."""
    spec = importlib.util.find_spec("mistral_common")
    folders = spec.submodule_search_locations if spec else []
    paths = [path for folder in folders for path in Path(folder).glob("data/*.model.v3")]
    if not paths:
        pytest.skip("needs the package mistral_common, which carries Mistral v0.3's vocabulary")
    return paths[0]


def mistral():
    """The tokenizer of `mistral_file`."""
    return tokenizers.load("sentencepiece_chat", mistral_file(), vocab_size=32768)


def conversations(count, seed=0):
    """Conversations of all kinds and lengths, those of text alone among them."""
    rng = np.random.default_rng(seed)
    out = []
    for at in range(count):
        turns = tuple(
            Turn("q" * int(rng.integers(1, 20)), "a" * int(rng.integers(1, 40)), f"i{at}")
            for _ in range(int(rng.integers(1, 4)))
        )
        kind = ("video", "image", None)[int(rng.choice(3, p=(0.6, 0.25, 0.15)))]
        media = () if kind is None else (Medium(kind, f"{kind}{at}"),)
        out.append(Conversation(turns, media, id=str(at)))
    return out
