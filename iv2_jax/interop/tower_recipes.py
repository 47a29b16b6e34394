"""What the towers of a stage-2 or CLIP model take from weights of any origin.

Each recipe gets an opened source and the config of the model that starts from it, and gives the
parameters it fills, by their paths in that model. All are strict: what a source has beside them is
left out for a reason that is logged, what it lacks stays fresh for a reason that is given back, and
anything else is a `CheckpointError` that lists every key.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import clip_recipes, entries, families
from iv2_jax.interop.entries import Entry
from iv2_jax.interop.position_files import file_grid, fit_positions
from iv2_jax.interop.run_config import bare_student
from iv2_jax.interop.sources import WeightSource
from iv2_jax.interop.taking import (
    ENCODER_FIELDS,
    Taken,
    by,
    check_same,
    encoder_of,
    read_table,
    tower_of,
    under,
)
from iv2_jax.interop.text_recipes import bert_tensors
from iv2_jax.interop.torch_keys import HEADS, student_map
from iv2_jax.interop.torch_keys import audio as audio_keys
from iv2_jax.interop.torch_keys.clip import IGNORABLE as CLIP_IGNORABLE
from iv2_jax.interop.torch_keys.clip import llama_clip_map, mobileclip_map
from iv2_jax.interop.torch_keys.text import bert_map
from iv2_jax.models import kinds, lora
from iv2_jax.models.clip import ClipConfig, SmallClipConfig
from iv2_jax.models.stage2 import Stage2Config
from iv2_jax.models.student import StudentConfig
from iv2_jax.models.text.bert import BertConfig
from iv2_jax.models.text.llama_clip import LORA, LORA_TARGETS

logger = logging.getLogger(__name__)

Model = Stage2Config | ClipConfig | SmallClipConfig

_VISION, _TEXT, _AUDIO = "vision_encoder", "text_encoder", "audio_encoder"


def vision_tower(source: WeightSource, config: Model, *, frames: int = 0) -> Taken:
    """The vision tower of a stage-1 or distilled student, a classifier, a stage-2 or CLIP model.

    Positions are interpolated to the model's frames and pictures; alignment decoders go along if
    the model has the same (stage 2 does, CLIP does not); the table for images, where the source has
    none, stays fresh: the sine-cosine table of one frame (spec stage2 2 and 7.4).

    Args:
        source: opened weights; keys bare or under `vision_encoder.`.
        config: the model that starts from it.
        frames: frames of the clips that a file's positions are of; 0 finds them.

    Returns:
        The filled parameters under `vision_encoder/`.

    Raises:
        CheckpointError: the encoders do not fit, or something is left over.
        ConfigError: a source of ours has another encoder than `config` says.
    """
    target = config.vision
    student = target if isinstance(target, StudentConfig) else bare_student(target)
    # A bare encoder's parameters stand right under the tower.
    strip = "" if isinstance(target, StudentConfig) else "encoder/"
    known = encoder_of(source.config)
    if known is not None:
        check_same(known, student.encoder, ENCODER_FIELDS, "vision", source)
        frames = known.num_frames
    tensors, others = source.under(f"{_VISION}.")
    grid = file_grid(tensors, student.encoder, frames=frames)
    tensors = fit_positions(tensors, student.encoder, frames=frames)
    wanted, fresh, notes = [], {}, []
    for entry in student_map(student):
        reason = _branch_misfit(entry, tensors)
        if reason:
            fresh[f"{_VISION}/{entry.path.removeprefix(strip)}"] = reason
        else:
            wanted.append(entry)
    # A branch whose decoders do not fit stays fresh as a whole, its positions too.
    branches = {p.split("/")[1].split("_")[0] for p in fresh if "_decoder" in p}
    for entry in [e for e in wanted if e.path.split("_")[0] in branches]:
        wanted.remove(entry)
        fresh[f"{_VISION}/{entry.path}"] = "goes with the decoders of its branch"
    params = entries.from_torch(
        tensors, wanted, ignore=HEADS | {"temp": "temperature"}, source=str(source.path)
    )
    flat = traverse_util.flatten_dict(params, sep="/")
    if grid not in (None, student.encoder.grid):
        notes.append(f"positions {by(grid)} -> {by(student.encoder.grid)} patches")
    if others:
        notes.append(f"{others} keys outside of {_VISION}. left out")
    flat = {f"{_VISION}/{path.removeprefix(strip)}": value for path, value in flat.items()}
    return Taken(flat, fresh, tuple(notes))


def text_tower(source: WeightSource, config: Model) -> Taken:
    """The text tower.

    Stage 2: of a model in BERT's layout (bert-large-uncased, MiniLM, a stage-2 text tower), see
    `text_recipes.bert_tensors`. Large CLIP: InternVL-C's (`transformer.*`, `text_projection`);
    adapters that the model has and the file lacks stay fresh, which changes nothing as they start
    at zero; those that the file has and the model lacks are folded in. Small CLIP: MobileCLIP's.

    Args:
        source: opened weights; keys bare or under `text_encoder.`.
        config: the model that starts from it.

    Returns:
        The filled parameters under `text_encoder/`.

    Raises:
        CheckpointError: the towers do not fit, or something is left over.
        ConfigError: the source says that it has other heads or norms than `config`.
    """
    if isinstance(config, Stage2Config):
        return _bert_tower(source, config.text)
    if isinstance(config, SmallClipConfig):
        tensors, notes = tower_of(source, _TEXT)
        ignore = {
            r"(?!embedding_layer|transformer\.|positional_embedding|final_layer_norm"
            r"|projection_layer).*": "parts of the file other than its text tower"
        }
        flat = read_table(tensors, mobileclip_map(config.text), ignore, source)
        return Taken(under(_TEXT, flat), {}, notes)
    tensors, notes = tower_of(source, _TEXT)
    tensors = clip_recipes.modern_peft_names(tensors)
    adapted = any(".lora_" in key for key in tensors)
    own, has = config.text, config.text.decoder.lora is not None
    plain = own.without_lora()
    read = (own if has else plain.with_lora(LORA, LORA_TARGETS)) if adapted else plain
    ignore = CLIP_IGNORABLE | {
        r"(?!transformer\.|text_projection).*": "parts of the file other than its text tower"
    }
    flat = read_table(tensors, llama_clip_map(read), ignore, source)
    fresh = {}
    if adapted and not has:
        merged = lora.merge(traverse_util.unflatten_dict(flat, sep="/"), LORA)
        flat = traverse_util.flatten_dict(merged, sep="/")
        notes = (*notes, f"adapters folded in at alpha {LORA.alpha:g}, rank {LORA.rank}")
    elif has and not adapted:
        fresh = {
            f"{_TEXT}/{entry.path}": "the file has no adapters; they start at zero"
            for entry in llama_clip_map(own)
            if entry.path not in flat
        }
    return Taken(under(_TEXT, flat), fresh, notes)


def audio_tower(source: WeightSource, config: Model) -> Taken:
    """The audio tower of stage 2: BEATs (spec stage2 5.2).

    Args:
        source: opened weights; keys bare or under `audio_encoder.`, weight normalisation in any of
            PyTorch's three forms.
        config: the model that starts from it.

    Returns:
        The filled parameters under `audio_encoder/`.

    Raises:
        ConfigError: the model has no audio tower.
        CheckpointError: the towers do not fit, or something is left over.
    """
    if not isinstance(config, Stage2Config) or config.audio is None:
        raise ConfigError(f"tower 'audio' from {source.path}: the model has no audio tower")
    tensors, notes = tower_of(source, _AUDIO)
    tensors = audio_keys.weight_norm_keys(tensors)
    flat = read_table(tensors, audio_keys.beats_map(config.audio), audio_keys.IGNORABLE, source)
    return Taken(under(_AUDIO, flat), {}, notes)


def whole_model(
    source: WeightSource, config: Model, *, frames: int = 0, partial: bool = False
) -> Taken:
    """A whole model of the same kind: to go on from it, at another number of frames maybe.

    Positions are interpolated. Optional parts may differ: alignment decoders, the masked-LM head,
    tables for images, everything that belongs to audio; what the model lacks is left out, what the
    source lacks stays fresh.

    Args:
        source: opened weights.
        config: the model that starts from it.
        frames: as in `vision_tower`.
        partial: the source is an overlay, such as a released CLIP delta: any part of the model.

    Returns:
        The filled parameters.

    Raises:
        CheckpointError: anything else is missing, left over or of another shape.
        ConfigError: a source of ours has other towers than `config` says.
    """
    known = encoder_of(source.config)
    encoder = encoder_of(config)
    if known is not None:
        check_same(known, encoder, ENCODER_FIELDS, "vision", source)
        frames = known.num_frames
    tensors: Mapping[str, Any] = source.tensors
    if isinstance(config, Stage2Config):
        tensors = _bert_names(tensors, config.text.mlm_head)
    prefix = f"{_VISION}."
    grid = file_grid(tensors, encoder, frames=frames, prefix=prefix)
    tensors = fit_positions(tensors, encoder, frames=frames, prefix=prefix)
    tensors, table = families.of(config).to_read(_without_adapters(config, tensors), tensors)
    wanted, fresh = [], {}
    for entry in entries.parameters(table):
        if any(key in tensors for key in entry.all_keys):
            wanted.append(entry)
        elif partial or _OPTIONAL_PATH.fullmatch(entry.path):
            fresh[entry.path] = "the source has none"
        else:
            wanted.append(entry)  # is missed, with all others, in one message
    if not wanted:
        raise CheckpointError(f"{source.path} has nothing of the model")
    ignore = {**families.of(config).ignorable(), **_OPTIONAL_KEYS}
    flat = read_table(tensors, wanted, ignore, source)
    notes = ()
    if grid not in (None, encoder.grid):
        notes = (f"positions {by(grid)} -> {by(encoder.grid)} patches",)
    return Taken(flat, fresh, notes)


# What one stage-2 or CLIP model may have and another may not.
_OPTIONAL_PATH = re.compile(
    r"(.*/)?(clip_|clip_img_)pos_embed|(.*/)?img_pos_embed|(.*/)?(clip|final_clip)_decoder/.*"
    r"|text_encoder/head/.*|text_encoder/.*/lora_[ab]"
    r"|audio_(encoder|proj|tokens)/.*|fusion/.*|(atm|avtm)_head/.*"
)
_OPTIONAL_KEYS = {
    r"vision_encoder\.(clip|clip_img|img|mae)_pos_embed": "positions that the model lacks",
    r"vision_encoder\.(clip|final_clip|mae)_decoder\..*": "alignment decoders the model lacks",
    r"text_encoder\.cls\..*": "masked-LM head, which the model lacks",
    r"text_encoder\.(bert\.)?embeddings\.position_ids": "numbers of positions",
    r"(audio_(encoder|proj)|av_concat_audio_proj|av_fusion|atm_head|avtm_head)\..*": (
        "parts for audio, which the model lacks"
    ),
}


def _bert_tower(source: WeightSource, config: BertConfig) -> Taken:
    """The text tower of stage 2."""
    _check_bert(source, config)
    tensors, notes = tower_of(source, _TEXT)
    table = bert_map(config)

    @cache
    def draw() -> dict[str, Any]:
        """Fresh parameters of the tower, drawn on the host's CPU."""
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            params = kinds.of(config).init_params(config, jax.random.key(0))
        return traverse_util.flatten_dict(meta.unbox(params), sep="/")

    state, fresh, left = bert_tensors(tensors, table, draw, source=str(source.path))
    if left:
        notes = (*notes, f"left out: {', '.join(left)}")
    kept = [e for e in entries.parameters(table) if all(key in state for key in e.torch_keys)]
    flat = read_table(state, kept, {}, source)
    return Taken(
        under(_TEXT, flat), {f"{_TEXT}/{path}": reason for path, reason in fresh.items()}, notes
    )


def _check_bert(source: WeightSource, config: BertConfig) -> None:
    """Compares what shapes do not tell: heads, norms, activation."""
    known = getattr(source.config, "text", source.config)
    if isinstance(known, BertConfig):
        check_same(known, config, ("num_heads", "epsilon"), "text", source)
    described = source.described
    pairs = {
        "num_attention_heads": ("text.num_heads", config.num_heads),
        "layer_norm_eps": ("text.epsilon", config.epsilon),
        "hidden_act": ("GELU of the text tower", "gelu"),
        "position_embedding_type": ("positions of the text tower", "absolute"),
    }
    differ = [
        f"{name} is {described[name]!r}, {ours} is {value!r}"
        for name, (ours, value) in pairs.items()
        if name in described and not _equal(described[name], value)
    ]
    if differ:
        raise ConfigError(f"config.json beside {source.path}: " + "; ".join(differ))


def _equal(one: Any, other: Any) -> bool:
    """Whether two settings are the same, numbers up to how they were written."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _branch_misfit(entry: Entry, tensors: Mapping[str, Any]) -> str:
    """Why an alignment head or a table for images cannot come from the source; "" if it can."""
    if not re.fullmatch(
        r"(clip|mae|final_clip)_decoder/.*|(.*/)?(clip_|mae_|img_|clip_img_).*", entry.path
    ):
        return ""
    if not any(key in tensors for key in entry.torch_keys):
        return "the source has none"
    if entry.stacked:
        following = re.sub(r"\d+", str(len(entry.torch_keys)), entry.torch_keys[0], count=1)
        if following in tensors:
            return "the source has more of them"
    for key in entry.torch_keys:
        shape = tuple(np.shape(tensors[key])) if key in tensors else None
        if shape != entry.torch_shape:
            return f"the source's is {shape or 'missing'}, the model's {entry.torch_shape}"
    return ""


def _without_adapters(config: Model, tensors: Mapping[str, Any]) -> Model:
    """The config by which to read a file that has no adapters, though the model may."""
    if isinstance(config, ClipConfig) and not any(".lora_" in key for key in tensors):
        return dataclasses.replace(config, text=config.text.without_lora())
    return config


def _bert_names(tensors: Mapping[str, Any], mlm_head: bool) -> Mapping[str, Any]:
    """Text keys with `bert.` (a model with the masked-LM head) or without (one without)."""
    with_bert = f"{_TEXT}.bert."
    if mlm_head:
        bare = re.compile(rf"{_TEXT}\.(?=(embeddings|encoder)\.)")
        return {bare.sub(with_bert, key): value for key, value in tensors.items()}
    return {
        f"{_TEXT}.{key.removeprefix(with_bert)}" if key.startswith(with_bert) else key: value
        for key, value in tensors.items()
    }
