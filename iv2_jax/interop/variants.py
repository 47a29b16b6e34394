"""Other names that files have for the same tensors, brought to those of the key tables.

Each function takes a config and a file's tensors and gives the tensors, renamed where need be, and
the entries that fit them. Nothing is copied or read that is not asked for later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from iv2_jax.interop import families
from iv2_jax.interop.entries import Entry
from iv2_jax.models import kinds

Reading = tuple[Mapping[str, Any], list[Entry]]


def beats(config: Any, tensors: Mapping[str, Any]) -> Reading:
    """The three ways PyTorch has written weight normalisation (spec stage2 10)."""
    from iv2_jax.interop.torch_keys import audio

    return audio.weight_norm_keys(tensors), audio.beats_map(config)


def stage2(config: Any, tensors: Mapping[str, Any]) -> Reading:
    """As `beats`, for the audio tower of a stage-2 model."""
    from iv2_jax.interop.torch_keys import audio, stage2

    if config.audio is not None:
        tensors = audio.weight_norm_keys(tensors, key_prefix="audio_encoder.")
    return tensors, stage2.stage2_map(config)


def peft(config: Any, tensors: Mapping[str, Any]) -> Reading:
    """The two ways peft has named adapted maps, told by the file's keys."""
    from iv2_jax.interop.torch_keys import llm

    table = kinds.resolve(families.of(config).keys)
    names = llm.peft_names(list(tensors))
    return tensors, table(config) if names is None else table(config, peft=names)


def chat(config: Any, tensors: Mapping[str, Any]) -> Reading:
    """As `peft`; and LayerScale as the encoder's own files name it (spec stage3 9)."""
    named = re.compile(r"(vision_encoder\.blocks\.\d+\.ls[12])\.gamma")
    renamed = {named.sub(r"\1", key): value for key, value in tensors.items()}
    return peft(config, renamed if len(renamed) == len(tensors) else tensors)
