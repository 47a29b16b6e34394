"""CLIP runs small enough for tests: the zoo's tiny models, batches made up on the spot."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from iv2_jax import config as config_lib
from iv2_jax.models import zoo
from iv2_jax.models.clip import ClipConfig
from iv2_jax.train.clip import ClipTrainConfig

LENGTH = 8
FREEZE = ["vision_encoder/.*", "text_encoder/.*"]
OPEN = ["vision_encoder/pool/.*"]


def model(small: bool = False, *, drop_path: float = 0.0, lora: bool = False) -> Any:
    """A tiny model of either kind; LayerScale so strong that its blocks count."""
    config = zoo.get("test_tiny_clip_small" if small else "test_tiny_clip")
    vision = dataclasses.replace(config.vision, drop_path_rate=drop_path, layer_scale_init=0.5)
    config = dataclasses.replace(config, vision=vision)
    if lora:
        config = dataclasses.replace(config, text=config.text.with_lora())
    return config


def values(clip: Any, **changes: Any) -> dict[str, Any]:
    """A run of the pool alone on images and videos."""
    text = {"tokenizer": "mobileclip", "path": "unused", "max_length": LENGTH}
    data = {"source": "unused", "size": clip.vision.image_size, "text": text}
    return {
        "stage": "clip",
        "steps": 3,
        "batch_size": 8,
        "clip" if isinstance(clip, ClipConfig) else "clip_small": config_lib.to_dict(clip),
        "data": {
            "media": {
                "image": {**data, "media": "image"},
                "video": {**data, "media": "video", "num_frames": clip.vision.num_frames},
            }
        },
        "optimizer": {
            "lr": 1e-2,
            "scale_lr_by_batch": False,
            "clip_norm": 0.0,
            "decay": [["temp", 0.0]],
            "freeze": FREEZE,
            "open": OPEN,
        },
        "mesh": {"max_devices": 1},
        "tensorboard": False,
    } | changes


def config(clip: Any, **changes: Any) -> ClipTrainConfig:
    """`values` as a checked config."""
    return config_lib.build(ClipTrainConfig, values(clip, **changes))


def batch(clip: Any, step: int, *, media: str = "video", rows: int = 8) -> dict[str, Any]:
    """A batch as the loader gives it."""
    rng = np.random.default_rng(step)
    frames = 1 if media == "image" else clip.vision.num_frames
    side = clip.vision.image_size
    ids = rng.integers(3, clip.text.vocab_size, (rows, LENGTH)).astype(np.int32)
    ids[:, LENGTH - 2 :] = 0
    return {
        "video": rng.integers(0, 256, (rows, frames, side, side, 3)).astype(np.uint8),
        "text_video": ids,
        "match_id": (np.arange(rows) // 2 if step % 2 else np.arange(rows)).astype(np.int32),
        "media": media,
        "index": np.arange(rows, dtype=np.int32),
        "replaced": np.zeros(rows, np.int32),
    }
