"""A CLIP run on decoded clips and pictures: batches, training, retrieval, export, resume."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from iv2_jax import cli
from iv2_jax import config as config_lib
from iv2_jax.models import zoo
from iv2_jax.train import checkpoint, loop
from iv2_jax.train.clip import ClipTrainConfig
from tests.data import multimodal
from tests.train import tiny_clip


def _config(folder, **changes):
    """The pool of a tiny model on six videos and four pictures."""
    clip = tiny_clip.model(small=True)
    text = dataclasses.replace(clip.text, vocab_size=128, context_length=8)
    clip = dataclasses.replace(clip, text=text)
    data = multimodal.write_lists(folder)
    size = {"size": clip.vision.image_size}
    frames = size | {"num_frames": clip.vision.num_frames}
    video = dataclasses.replace(data["video"], **frames)
    values = tiny_clip.values(clip) | {
        "batch_size": 2,
        "data": {
            "media": {
                "image": config_lib.to_dict(dataclasses.replace(data["image"], **size)),
                "video": config_lib.to_dict(video),
            }
        },
        "eval_data": config_lib.to_dict(dataclasses.replace(video, augment="stretch", eval=True)),
        "loss": {"frame_tokens": 1},
        "retrieval": {"batch_size": 2},
    }
    return config_lib.build(ClipTrainConfig, values | changes)


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_train_evaluate_stop_resume_and_export(tmp_path):
    assert zoo.get("test_tiny_clip_small").vision.image_positions == "shared"
    whole = _config(tmp_path, steps=4)
    assert loop.train(whole, tmp_path / "whole").reason == "complete"
    lines = _lines(tmp_path / "whole")
    evaluated = [line for line in lines if any(key.startswith("sim/") for key in line)]
    assert len(evaluated) == 2  # before the first step and after the last
    assert evaluated[0]["clips"] == 6
    stopped = _config(tmp_path, steps=4, stop_after=2)
    assert loop.train(stopped, tmp_path / "parts").reason == "stopped"
    assert loop.train(whole, tmp_path / "parts").reason == "complete"
    losses = [
        [line["loss"] for line in _lines(tmp_path / name) if "lr" in line]
        for name in ("whole", "parts")
    ]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    first, last = (checkpoint.load_params(tmp_path / name)[0] for name in ("whole", "parts"))
    np.testing.assert_array_equal(
        first["vision_align"]["proj"]["kernel"], last["vision_align"]["proj"]["kernel"]
    )
    out = tmp_path / "exported"
    assert cli.main(["export", "--ckpt", str(tmp_path / "whole"), "--to", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["kind"] == "clip_small"
