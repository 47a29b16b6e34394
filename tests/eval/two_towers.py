"""Clips with captions, a vocabulary and tiny two-tower models for tests of retrieval."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from iv2_jax.data.modalities import AudioConfig, TextConfig
from iv2_jax.data.pipeline import DataConfig
from iv2_jax.data.tokenizers.wordpiece import BERT_VOCAB_SIZE
from iv2_jax.models import kinds
from tests.data import clips

WORDS = ["a", "red", "blue", "ball", "cat", "dog", "jumps", "sleeps", "runs", "two", "man", "is"]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]

CAPTIONS = (
    ("A red ball.",),
    ("A cat sleeps", "two cat runs"),
    ("a dog jumps!",),
    ("A CAT sleeps",),
    ("Blue man runs",),
    ("two dog sleeps", "a man is blue"),
)


def write_set(folder: Path, captions=CAPTIONS, *, audio: bool = False) -> Path:
    """Clip i shows numbers from 16 i on; returns the manifest, with `vocab.txt` beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i, texts in enumerate(captions):
        name = f"clip{i}.mp4"
        clips.write_clip(folder / name, range(16 * i, 16 * i + 8), audio=audio)
        records.append(
            {"id": f"c{i}", "path": name, "captions": {"video": list(texts)}, "split": "test"}
            | {"label": "cat" if any("cat" in t.lower() for t in texts) else "other thing"}
        )
    fill = [f"[unused{i}]" for i in range(BERT_VOCAB_SIZE - len(TOKENS))]
    (folder / "vocab.txt").write_text("\n".join([*TOKENS, *fill]) + "\n")
    return clips.write_manifest(folder / "clips.jsonl", records)


def text_config(folder: Path, **changes) -> TextConfig:
    """BERT's tokenizer with the tiny vocabulary."""
    values = {
        "tokenizer": "bert",
        "path": str(folder / "vocab.txt"),
        "max_length": 8,
    }
    return TextConfig(**(values | changes))


def data_config(folder: Path, *, text: TextConfig | None = None, **changes) -> DataConfig:
    """Held-out clips as the tiny models take them."""
    values = {
        "source": str(folder / "clips.jsonl"),
        "split": "test",
        "num_frames": 4,
        "size": 56,
        "sampling": "middle",
        "augment": "center",
        "eval": True,
        "threads": 0,
        "text": text or text_config(folder),
        "max_bad_share": 1.0,
    }
    return DataConfig(**(values | changes))


def audio_config() -> AudioConfig:
    """Sound as the tiny audio encoder takes it: 24 frames of 8 mels."""
    return AudioConfig(num_mels=8, seconds=0.255)


def params_of(config, seed: int = 0):
    """Random parameters, drawn without compiling an initialisation."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        around = 1.0 if path[-1].key in ("scale", "gate_scale", "weight_g") else 0.0
        return (around + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)

    tree = kinds.of(config).abstract_params(config)
    params = jax.tree_util.tree_map_with_path(draw, tree)
    return {**params, "temp": np.float32(0.07)}
