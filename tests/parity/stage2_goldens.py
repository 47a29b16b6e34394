"""Configs of the stage-2 models from the arguments in a golden case's header."""

from __future__ import annotations

import dataclasses

import numpy as np

from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.stage2 import IGNORABLE, stage2_map
from iv2_jax.models.audio.beats import BeatsConfig
from iv2_jax.models.stage2 import Stage2Config
from tests.parity import goldens
from tests.parity.goldens import Golden
from tests.parity.test_bert import bert_config

# Arguments of the original's audio encoder that our module has fixed, and their only values.
_BEATS_FIXED = {
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "finetuned_model": False,
}
_BEATS_FIELDS = {
    "input_patch_size": "patch_size",
    "embed_dim": "patch_width",
    "conv_bias": "patch_bias",
    "encoder_layers": "depth",
    "encoder_embed_dim": "width",
    "encoder_ffn_embed_dim": "mlp_width",
    "encoder_attention_heads": "num_heads",
    "deep_norm": "deep_norm",
    "conv_pos": "conv_taps",
    "conv_pos_groups": "conv_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_distance",
    "dropout": "dropout_rate",
    "attention_dropout": "attention_dropout_rate",
    "encoder_layerdrop": "layer_drop",
    "layer_wise_gradient_decay_ratio": "gradient_decay",
}


def beats_config(ctor: dict) -> BeatsConfig:
    """Audio encoder of a constructor's arguments."""
    unread = set(ctor) - _BEATS_FIELDS.keys() - _BEATS_FIXED.keys()
    assert not unread, f"unknown arguments of the audio encoder: {sorted(unread)}"
    for name, value in _BEATS_FIXED.items():
        assert ctor.get(name, value) == value, f"{name}={ctor[name]!r} is not supported"
    values = {ours: ctor[theirs] for theirs, ours in _BEATS_FIELDS.items() if theirs in ctor}
    # The class's default; the released file says 0.6.
    return BeatsConfig(**{"gradient_decay": 1.0} | values)


def stage2_config(golden: Golden) -> Stage2Config:
    """Model of a `s2_*_all_losses` case; which parts it has follows from its weights."""
    meta, weights = golden.meta, golden.weights
    vision = dataclasses.replace(
        golden,
        meta={"ctor": meta["vision_ctor"]},
        weights={
            key.removeprefix("vision_encoder."): value
            for key, value in weights.items()
            if key.startswith("vision_encoder.")
        },
    )
    has_head = "text_encoder.cls.predictions.bias" in weights
    return Stage2Config(
        vision=goldens.student_config(vision),
        text=bert_config(dict(meta["bert"]), mlm_head=has_head),
        audio=beats_config(meta["beats"]) if "beats" in meta else None,
        joint_width=meta.get("embed_dim", meta.get("contra_dim")),
        project_tokens="av_concat_dim" in meta,
        av_fusion="av_fusion.weight" in weights,
        audio_matching="atm_head.weight" in weights,
        av_matching="avtm_head.weight" in weights,
        temp_init=meta["temp_init"],
    )


def stage2_params(golden: Golden, config: Stage2Config) -> dict:
    """Our parameters from the case's weights."""
    return torch_keys.from_torch(
        golden.weights, stage2_map(config), ignore=IGNORABLE, source=golden.name
    )


def channels_last(video: np.ndarray) -> np.ndarray:
    """Stage 2's `(B, T, C, H, W)` as `(B, T, H, W, C)`."""
    return video.transpose(0, 1, 3, 4, 2)
