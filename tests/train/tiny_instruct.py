"""Stage-3 runs small enough for tests: the zoo's tiny chat model, a byte tokenizer, short clips."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iv2_jax import config as config_lib
from iv2_jax.models import zoo
from iv2_jax.models.chat import ChatConfig
from iv2_jax.models.lora import LoraConfig
from tests.data import clips

SPECIALS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
VOCAB = 256 + len(SPECIALS)


def write_tokenizer(folder: Path) -> Path:
    """A Hugging Face folder whose tokenizer has a token for every byte."""
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*SPECIALS, *letters])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(SPECIALS))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def write_talks(folder: Path, *, kinds: str = "video", bad: bool = False) -> Path:
    """Conversations about clips (pictures, nothing); with `bad` one about a broken file."""
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for at in range(3):
        clips.write_clip(folder / f"{at}.mp4", range(40 * at, 40 * at + 10))
        qa = [{"i": "", "q": f"Which clip, {word}?", "a": f"{word} {at}"} for word in ("a", "bcd")]
        records.append({"video": f"{at}.mp4", "QA": qa})
    if "image" in kinds:
        Image.fromarray(clips.picture(7)).save(folder / "p.png")
        records += [{"image": "p.png", "QA": [{"i": "", "q": "What?", "a": "seven"}]}] * 2
    if "text" in kinds:
        records += [{"QA": [{"i": "", "q": "Hi", "a": "Hello, you"}]}] * 2
    if bad:
        (folder / "bad.mp4").write_bytes(b"nothing")
        records.append({"video": "bad.mp4", "QA": [{"i": "", "q": "What?", "a": "none"}]})
    path = folder / f"talks_{kinds}{'_bad' if bad else ''}.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def model(*, lora: float | None = None, drop: float = 0.0) -> ChatConfig:
    """The tiny model with the byte tokenizer's table; adapters with this dropout."""
    config = zoo.get("test_tiny_chat")
    llm = dataclasses.replace(config.llm, vocab_size=VOCAB)
    if lora is not None:
        llm = llm.with_lora(LoraConfig(2, 4.0, lora), ("q", "down"), head=True)
    bridge = dataclasses.replace(
        config.bridge,
        depth=2,
        dropout_rate=drop,
        attention_dropout_rate=drop,
        drop_path_rate=drop,
    )
    encoder = dataclasses.replace(config.encoder, drop_path_rate=drop)
    return dataclasses.replace(config, encoder=encoder, bridge=bridge, llm=llm)


def values(
    folder: Path, mix: Path | str, chat: ChatConfig, *, talk: Any = None, **changes: Any
) -> dict[str, Any]:
    """A run on packed rows of 128 positions and two views."""
    return {
        "stage": "instruct",
        "steps": 4,
        "batch_size": 2,
        "chat": config_lib.to_dict(chat),
        "talk": {
            "tokenizer": str(folder),
            "sequence": {"max_length": 128, "tokens_per_view": chat.bridge.num_tokens},
            "frames": chat.encoder.num_frames,
            "size": chat.encoder.image_size,
        }
        | (talk or {}),
        "mix": str(mix),
        "rows": {"mode": "pack", "lengths": [128], "views": [2], "max_segments": 4},
        "load": {"threads": 0, "max_bad_share": 1.0},
        "optimizer": {"lr": 0.01, "scale_lr_by_batch": False, "min_lr": 0.001},
        "mesh": {"max_devices": 1},
        "tensorboard": False,
    } | changes


FREEZE = ["encoder/.*", "llm/.*"]
OPEN = ["llm/.*/lora_[ab]"]


def draw(shapes: Any, seed: int = 0) -> Any:
    """Random parameters of these shapes, large enough that every part counts."""
    import jax

    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.dtype(x.dtype)), shapes
    )
