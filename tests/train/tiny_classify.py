"""Classifier runs small enough for tests: two blocks, pictures of four patches, three classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import av
import numpy as np

from iv2_jax import config as config_lib
from iv2_jax.models import zoo
from iv2_jax.models.classifier import ClassifierConfig
from iv2_jax.train.classify_config import ClassifyConfig
from tests.data.clips import write_manifest

CLASSES = ("circle", "left", "right")
SIZE, FRAMES = 28, 4


def model(**changes: Any) -> ClassifierConfig:
    """A tiny classifier whose blocks and head count from the first step."""
    encoder = dataclasses.replace(
        zoo.get("test_tiny"),
        depth=2,
        image_size=SIZE,
        num_frames=FRAMES,
        layer_scale_init=0.5,
        drop_path_rate=changes.pop("drop_path", 0.0),
    )
    fields = {"num_classes": len(CLASSES), "head_init_scale": 1.0} | changes
    return ClassifierConfig(encoder, **fields)


def values(classifier: ClassifierConfig | None = None, **changes: Any) -> dict[str, Any]:
    """A run without clips of its own."""
    classifier = classifier or model()
    data = {"source": "unused", "size": SIZE, "num_frames": FRAMES, "sampling": "segments"}
    given = {
        "stage": "classify",
        "steps": 3,
        "batch_size": 8,
        "classifier": config_lib.to_dict(classifier),
        "data": data | changes.pop("data", {}),
        "optimizer": {"lr": 3e-3, "scale_lr_by_batch": False, "clip_norm": 0.0},
        "mesh": {"max_devices": 1},
        "tensorboard": False,
    }
    return given | changes


def config(classifier: ClassifierConfig | None = None, **changes: Any) -> ClassifyConfig:
    """`values` as a checked config."""
    return config_lib.build(ClassifyConfig, values(classifier, **changes))


def batch(rows: int = 8, views: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise with labels, as the loader gives it."""
    rng = np.random.default_rng(seed)
    shape = (rows, *([views] if views > 1 else []), FRAMES, SIZE, SIZE, 3)
    return {
        "video": rng.integers(0, 256, shape, dtype=np.uint8),
        "label": rng.integers(0, len(CLASSES), rows).astype(np.int32),
    }


def write_clips(folder: Path, counts: dict[str, int] | None = None) -> Path:
    """A manifest of little films: a green bar goes left, a blue one right, a red disc grows."""
    counts = counts or {"train": 12, "test": 5}
    records, rng = [], np.random.default_rng(0)
    for split, count in counts.items():
        for i in range(count):
            name = CLASSES[i % len(CLASSES)]
            path = folder / f"{split}{i}.mp4"
            _write(path, _film(name, rng))
            records.append(
                {"id": path.stem, "path": path.name, "split": split, "labels": {"motion": name}}
            )
    return write_manifest(folder / "clips.jsonl", records)


def _film(name: str, rng: np.random.Generator, frames: int = 12, side: int = 32) -> np.ndarray:
    """(T, H, W, 3) uint8."""
    y, x = np.mgrid[:side, :side]
    out = np.full((frames, side, side, 3), 30, np.uint8)
    shift = rng.integers(0, 6)
    colour = np.eye(3)[CLASSES.index(name)] * rng.integers(150, 255)
    for t in range(frames):
        at = (t * 2 + shift) % side
        if name == "circle":
            inside = (x - 16) ** 2 + (y - 16) ** 2 < (4 + t) ** 2
        else:
            inside = abs(x - (at if name == "right" else side - at)) < 5
        out[t][inside] = colour
    return out


def _write(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for picture in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
