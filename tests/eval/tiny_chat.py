"""A tiny chat model with random weights that reads letters, and clips to ask it about."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax.core import meta

from iv2_jax import config as config_lib
from iv2_jax.data.instruct.sequence import SequenceConfig
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.tokenizers.language_model import LlmTokenizer
from iv2_jax.eval.chat_runs import ChatModel
from iv2_jax.interop.load import save_checkpoint
from iv2_jax.models import chat as chat_lib
from iv2_jax.models import kinds
from tests.data import clips

CONFIG = dataclasses.replace(
    chat_lib.ZOO["test_tiny_chat"],
    llm=dataclasses.replace(chat_lib.ZOO["test_tiny_chat"].llm, vocab_size=110, context_length=600),
)


class Chars(LlmTokenizer):
    """Printable ASCII, a token each; the template's marks are one token each."""

    MARKS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")

    def __init__(self):
        self.specials = {mark: index for index, mark in enumerate(self.MARKS)}
        self.bos_id, self.eos_id = 1, 2
        super().__init__(max_length=4096, vocab_size=110, pad_id=-1)

    def _ids(self, text):
        ids = []
        while text:
            mark = next((m for m in self.MARKS if text.startswith(m)), None)
            ids.append(self.specials[mark] if mark else 10 + max(ord(text[0]) - 31, 0))
            text = text[len(mark) if mark else 1 :]
        return ids

    def decode(self, ids):
        return "".join(chr(i + 21) if i > 10 else "\n" for i in map(int, ids) if i > 9)


def talk(**changes) -> TalkConfig:
    """How the tiny model is talked to; its tokenizer is put in place by `use_chars`."""
    sequence = SequenceConfig(max_length=64, tokens_per_view=CONFIG.bridge.num_tokens)
    values = {"sequence": sequence, "frames": 2, "size": 28, "instruction": "Watch."}
    return TalkConfig("chars", **(values | changes))


def use_chars(monkeypatch) -> None:
    """Makes every run's tokenizer the one of letters."""
    monkeypatch.setattr("iv2_jax.data.instruct.talk.tokenizer_of", lambda _: Chars())


def params(seed: int = 0):
    """Random parameters; only the shapes are the initialiser's, which saves compiling it."""
    tree = jax.eval_shape(partial(kinds.of(CONFIG).init_params, CONFIG), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype("f4"), meta.unbox(tree)
    )


def chat_model(talk_config: TalkConfig) -> ChatModel:
    """The model as `open_chat` gives it."""
    builder = talk_config.make_builder(Chars())
    return ChatModel("tiny", CONFIG, params(), talk_config, builder, None)


def checkpoint(folder: Path, talk_config: TalkConfig | None) -> Path:
    """A workdir whose config holds `talk`, as a run of stage 3 writes it; None: as an import."""
    save_checkpoint(params(), CONFIG, folder, source="tests")
    if talk_config is not None:
        path = folder / "checkpoints" / "0" / "config" / "metadata"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"talk": config_lib.to_dict(talk_config)}))
    return folder


def write_benchmark(folder: Path) -> Path:
    """Two tasks of MVBench, one with stretches, and clips where the benchmark has them."""
    star, perception = (
        folder / "video" / name for name in ("star/Charades_v1_480", "perception/videos")
    )
    for path in (star, perception, folder / "json"):
        path.mkdir(parents=True)
    clips.write_clip(star / "a.mp4", 30, rate=10)
    clips.write_clip(perception / "b.mp4", range(64, 74))
    ask = {"question": "What is it?", "candidates": ["A cat.", "A dog.", "Mud."]}
    bounded = [
        {"video": "a.mp4", **ask, "answer": "A dog.", "start": s, "end": s + 1.0}
        for s in (0.0, 1.0)
    ]
    whole = [
        {"video": "b.mp4", **ask, "answer": "Mud.", "start": 9.0, "end": 1.0},
        {"video": "b.mp4", "question": "Left?", "candidates": ["yes", "no"], "answer": "no"},
        {"video": "b.mp4", "question": "Gone?", "candidates": ["yes", "no"], "answer": "yes"},
    ]
    (folder / "json" / "action_sequence.json").write_text(json.dumps(bounded))
    (folder / "json" / "object_shuffle.json").write_text(json.dumps(whole))
    return folder
