"""Small lists of every media type, with captions and a vocabulary for them."""

from __future__ import annotations

import string
import wave
from pathlib import Path

import numpy as np
from PIL import Image

from iv2_jax.data.modalities import AudioConfig, TextConfig
from iv2_jax.data.pipeline import DataConfig
from tests.data import clips

PAD, CLS = 0, 2
_WORDS = ("a", "dog", "cat", "runs", "sleeps", "left", "number", "barks", "rain", "of", "photo")


def write_vocabulary(folder: Path) -> Path:
    """A WordPiece vocabulary of a few words, digits and letters."""
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]
    tokens += [c for c in letters if c not in tokens] + [f"##{c}" for c in letters]
    path = folder / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def write_wav(path: Path, seconds: float = 0.5, *, rate: int = 16000, level: float = 0.3) -> Path:
    """A tone, or silence with `level` 0."""
    wave_form = np.sin(np.arange(int(seconds * rate)) * 440 * 2 * np.pi / rate) * level
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((wave_form * 32767).astype("<i2").tobytes())
    return path


def write_picture(path: Path, number: int, size: tuple[int, int] = (64, 48)) -> Path:
    """A picture of this (width, height) that shows a number."""
    Image.fromarray(clips.picture(number, *size)).save(path)
    return path


def text_config(vocabulary: Path, **changes: object) -> TextConfig:
    """Captions through the vocabulary above."""
    settings = {"path": str(vocabulary), "options": {"vocab_size": None}, "max_length": 8}
    return TextConfig(**settings | changes)


def write_lists(folder: Path) -> dict[str, DataConfig]:
    """Lists of 6 videos with and without sound, 4 pictures, 5 sounds and 3 texts."""
    vocabulary = write_vocabulary(folder)
    videos, pictures, sounds = [], [], []
    for i in range(6):
        clips.write_clip(folder / f"v{i}.mp4", range(8 * i, 8 * i + 8), audio=i % 2 == 0)
        texts = {"video": [f"a dog number {i}", f"a cat number {i}"], "avs": [f"barks {i}"]}
        videos.append({"path": f"v{i}.mp4", "captions": texts})
    for i in range(4):
        write_picture(folder / f"p{i}.png", i)
        pictures.append({"path": f"p{i}.png", "captions": f"photo of number {i}"})
    for i in range(5):
        write_wav(folder / f"s{i}.wav", 0.3 + 0.1 * i)
        sounds.append({"path": f"s{i}.wav", "captions": {"video": f"rain {i}"}})
    texts = [{"captions": f"sleeps {i}"} for i in range(3)]
    lists = {"video": videos, "image": pictures, "audio": sounds, "text": texts}
    paths = {n: clips.write_manifest(folder / f"{n}.jsonl", r) for n, r in lists.items()}
    paths["audio_video"] = paths["video"]
    audio = AudioConfig(num_mels=16, seconds=0.5)
    return {
        media: DataConfig(
            source=str(path),
            media=media,
            num_frames=1 if media == "image" else 2,
            size=16,
            sampling="middle",
            augment="random_resized_crop",
            text=text_config(vocabulary, captions=("video", "avs")),
            audio=audio if media in ("audio", "audio_video") else None,
            threads=0,
        )
        for media, path in paths.items()
    }
