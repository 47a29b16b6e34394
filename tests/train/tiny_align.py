"""A stage-2 run small enough for tests, on real files with sound."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from iv2_jax import config as config_lib
from iv2_jax.models import zoo
from iv2_jax.models.stage2 import Stage2Config
from iv2_jax.train.align_config import AlignConfig
from tests.data import multimodal

SIZE, FRAMES, VOCAB = 16, 2, 128
ALL_TERMS = ("vtc", "atc", "avc", "avtc", "vtm", "atm", "avtm", "mlm", "amlm", "avmlm")


def model(*, drop_path: float = 0.1, **changes: Any) -> Stage2Config:
    """The audiovisual layout of the zoo's tiny towers, for these clips."""
    config = zoo.get("test_tiny_stage2_audiovisual")
    encoder = dataclasses.replace(
        config.vision.encoder,
        image_size=SIZE,
        patch_size=4,
        num_frames=FRAMES,
        layer_scale_init=0.5,
        drop_path_rate=drop_path,
    )
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, encoder=encoder, clip=None, final_width=0),
        # Without dropout: its random bits are most of what XLA compiles here.
        text=dataclasses.replace(
            config.text, vocab_size=VOCAB, dropout_rate=0.0, attention_dropout_rate=0.0
        ),
        audio=dataclasses.replace(config.audio, num_mels=16, num_frames=48),
        **changes,
    )


def values(folder: Path, media: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """A run over the lists that `multimodal.write_lists` makes in `folder`."""
    lists = multimodal.write_lists(folder)
    chosen = media or tuple(sorted(lists))
    data = {name: config_lib.to_dict(lists[name]) for name in chosen}
    held = data.get("audio_video") or data[chosen[0]]
    return {
        "stage": "align",
        "steps": 6,
        "batch_size": 4,
        "stage2": config_lib.to_dict(model()),
        "data": {"media": data},
        "eval_data": held | {"augment": "stretch", "eval": True},
        "loss": {
            "weights": dict.fromkeys(ALL_TERMS, 1.0),
            "captions": {"avtc": "avs", "avtm": "avs", "avmlm": "avs"},
            "words": {"mask_id": 4, "special_ids": [0, 2]},
        },
        "video_mask": {"ratio": 0.5},
        "optimizer": {"lr": 1e-3, "scale_lr_by_batch": False},
        "retrieval": {"rerank_top": 2},
        "mesh": {"max_devices": 1},
        "tensorboard": False,
    } | changes


def config(folder: Path, media: tuple[str, ...] = (), **changes: Any) -> AlignConfig:
    """`values` as a checked config."""
    return config_lib.build(AlignConfig, values(folder, media, **changes))
