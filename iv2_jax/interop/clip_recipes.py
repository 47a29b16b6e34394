"""CLIP models put together from the files of others, as the original's loading order does.

Released CLIP checkpoints hold only what their training changed; trunk and text tower come from
elsewhere (spec stage2 7.4 and 10). Each function takes opened files (`load.open_tensors`) or other
mappings of torch keys, and returns one mapping with exactly the keys of the whole model: for
`entries.from_torch`, or, tensor by tensor in bounded memory, for `stream.import_tensors`. Values
are passed on unread.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.interop import entries as entries_lib
from iv2_jax.interop.position_files import fit_positions
from iv2_jax.interop.torch_keys.clip import (
    IGNORABLE,
    clip_delta_map,
    clip_map,
    llama_clip_map,
    mobileclip_map,
)
from iv2_jax.interop.torch_keys.video import HEADS, encoder_map
from iv2_jax.models import lora as lora_lib
from iv2_jax.models.clip import ClipConfig, SmallClipConfig, VisionAlign
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.text.llama_clip import LORA, LORA_TARGETS

Tensors = Mapping[str, Any]

_VISION, _TEXT = "vision_encoder.", "text_encoder."
# What the source files hold beside what is taken from them.
_NO_VISION = {r"(?!vision_encoder\.).*": "parts of the stage-2 model other than its video encoder"}
_NO_TEXT = {
    r"(?!text_encoder\.).*": "parts of the text's source other than its text tower",
    **IGNORABLE,
}


def clip_from_parts(
    stage2_vision: Tensors,
    text: Tensors,
    delta: Tensors | None,
    config: ClipConfig,
    *,
    vision_frames: int = 4,
) -> dict[str, Any]:
    """A large CLIP model from a stage-2 model, InternVL-C's text tower and a released delta.

    The video encoder is the stage-2 model's without decoders and image positions; its positions
    are interpolated from `vision_frames` to the config's frames, and to its image size. The text
    tower stands under `transformer.*` and `text_projection` (with or without `text_encoder.`). The
    delta (`1B_clip.pth`: attentive pool, temperature, rotary frequencies) is laid over both.

    Args:
        stage2_vision: the stage-2 model, or its `vision_encoder.*` alone.
        text: InternVL-C (`internvl_c_13b_224px.pth`), or its text tower alone.
        delta: the released CLIP checkpoint; None for a model that starts its training: the pool is
            then stage 2's and the temperature `config.temp_init`.
        config: the model's config.
        vision_frames: frames of the stage-2 positions, 4 in the releases.

    Returns:
        `{torch key: tensor}` of the whole model.

    Raises:
        CheckpointError: a part misses tensors, or has others or of other shapes; all are listed.
        ConfigError: the config has separable positions, which stage 2 cannot have.
    """
    if config.vision.separable_positions:
        raise ConfigError("vision.separable_positions: a stage-2 encoder has joint positions only")
    vision = fit_positions(
        _with_prefix(stage2_vision, _VISION), config.vision, frames=vision_frames, prefix=_VISION
    )
    dropped = {_under(_VISION, pattern): reason for pattern, reason in HEADS.items()}
    out = _part(
        vision,
        encoder_map(config.vision, key_prefix=_VISION),
        _NO_VISION | dropped,
        "the stage-2 model",
    )
    out |= _part(
        modern_peft_names(_with_prefix(text, _TEXT, r"transformer\..*|text_projection")),
        llama_clip_map(config.text, key_prefix=_TEXT),
        _NO_TEXT,
        "the text tower's file",
    )
    out["temp"] = np.float32(config.temp_init)
    return _laid_over(out, delta, config)


def small_clip_from_parts(
    student: Tensors,
    text: Tensors,
    delta: Tensors | None,
    config: SmallClipConfig,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """A small CLIP model from a distilled student, MobileCLIP and a delta.

    The student's keys are flat, as its stage saves them; decoders, their positions and a
    classifier are dropped. Nothing is interpolated: the original takes 8-frame checkpoints only.

    Args:
        student: a distilled or fine-tuned S, B or L model.
        text: MobileCLIP-B (`mobileclip_blt.pt`), keys `text_encoder.*`.
        delta: pool, `vision_align` and temperature of a trained model; None for one that starts
            its training: `vision_align` is then drawn and the temperature `config.temp_init`.
        config: the model's config.
        seed: for the draw of `vision_align`.

    Returns:
        `{torch key: tensor}` of the whole model.

    Raises:
        CheckpointError: a part misses tensors, or has others or of other shapes; all are listed.
    """
    vision = _part(student, encoder_map(config.vision), HEADS, "the student's file")
    out = {_VISION + key: value for key, value in vision.items()}
    out |= _part(text, mobileclip_map(config.text, key_prefix=_TEXT), _NO_TEXT, "MobileCLIP's file")
    out["temp"] = np.float32(config.temp_init)
    out |= _drawn_align(config, seed)
    return _laid_over(out, delta, config)


def modern_peft_names(tensors: Tensors) -> Tensors:
    """Gives adapted maps the names that peft has used since 0.6.

    Older versions keep `q_proj.weight` beside `q_proj.lora_A.default.weight` (the oldest without
    `default`); newer ones call it `q_proj.base_layer.weight`.

    Args:
        tensors: `{torch key: tensor}`, with adapters or without.

    Returns:
        The same tensors; `tensors` itself where there is nothing to rename.
    """
    renamed = {}
    for key in tensors:
        match = re.fullmatch(r"(.*)\.lora_([AB])(\.default)?\.weight", key)
        if match is None:
            continue
        module, letter, has_default = match.groups()
        if not has_default:
            renamed[key] = f"{module}.lora_{letter}.default.weight"
        if f"{module}.weight" in tensors:
            renamed[f"{module}.weight"] = f"{module}.base_layer.weight"
    if not renamed:
        return tensors
    return {renamed.get(key, key): value for key, value in tensors.items()}


def clip_from_lora(
    tensors: Tensors,
    config: ClipConfig,
    *,
    lora: LoraConfig = LORA,
    targets: tuple[str, ...] = LORA_TARGETS,
    dtype: Any = None,
) -> dict[str, Any]:
    """Parameters of a large CLIP model without adapters, from a checkpoint that has them.

    The original's `use_lora` wraps q and v of the text tower and keeps the adapters at zero
    (spec stage2 7.2): folding them in gives the same model, one product cheaper.

    Args:
        tensors: the whole model's, adapters named by an old or a new peft.
        config: the model's config, without adapters.
        lora: rank and strength of the checkpoint's adapters.
        targets: the adapted maps.
        dtype: dtype of the parameters; None keeps each tensor's own.

    Returns:
        Our parameters, nested.

    Raises:
        CheckpointError: tensors are missing, unexpected or of other shapes; all are listed.
        ConfigError: `config` has adapters: then read the tensors as they are.
    """
    if config.text.decoder.lora is not None:
        raise ConfigError("text.decoder.lora is set: a model with adapters keeps them apart")
    adapted = dataclasses.replace(config, text=config.text.with_lora(lora, targets))
    params = entries_lib.from_torch(
        modern_peft_names(tensors),
        clip_map(adapted),
        ignore=IGNORABLE,
        dtype=dtype,
        source="the checkpoint with adapters",
    )
    return lora_lib.merge(params, lora)


def clip_delta(
    params: Mapping[str, Any], config: ClipConfig | SmallClipConfig
) -> dict[str, np.ndarray]:
    """The tensors of a trained model that its release holds, as `1B_clip.pth` does.

    Args:
        params: the whole model's parameters.
        config: its config.

    Returns:
        `{torch key: array}`: attentive pool, temperature, `vision_align` (small models) and rotary
        frequencies (large ones).
    """
    entries = clip_delta_map(config)
    flat = traverse_util.flatten_dict(meta.unbox(dict(params)), sep="/")
    kept = {entry.path: flat[entry.path] for entry in entries_lib.parameters(entries)}
    return entries_lib.to_torch(traverse_util.unflatten_dict(kept, sep="/"), entries)


def _part(
    tensors: Tensors, entries: list[entries_lib.Entry], ignore: Mapping[str, str], source: str
) -> dict[str, Any]:
    """What the entries ask for, every other key accounted for."""
    plan = entries_lib.plan(tensors, entries, ignore=ignore, source=source)
    return {key: tensors[key] for _, keys in plan for key in keys}


def _laid_over(
    out: dict[str, Any], delta: Tensors | None, config: ClipConfig | SmallClipConfig
) -> dict[str, Any]:
    """The model with a delta's tensors in their place, complete."""
    if delta is not None:
        out |= _part(delta, clip_delta_map(config), IGNORABLE, "the CLIP delta")
    entries_lib.plan(out, clip_map(config), source="the CLIP model put together")
    return out


def _with_prefix(tensors: Tensors, prefix: str, own: str = ".*") -> Tensors:
    """The tensors with `prefix` before the keys that match `own`, if no key has it yet."""
    if any(key.startswith(prefix) for key in tensors):
        return tensors
    return {
        prefix + key if re.fullmatch(own, key) else key: value for key, value in tensors.items()
    }


def _under(prefix: str, pattern: str) -> str:
    """A pattern of whole keys, for keys with a prefix."""
    return rf"{re.escape(prefix)}(?:{pattern})"


def _drawn_align(config: SmallClipConfig, seed: int) -> dict[str, np.ndarray]:
    """The tensors of a freshly initialised `vision_align`."""
    pooled = np.zeros((1, config.vision.pool_width), np.float32)
    params = meta.unbox(VisionAlign(config).init(jax.random.key(seed), pooled)["params"])
    entries = [entry for entry in clip_map(config) if entry.path.startswith("vision_align/")]
    return entries_lib.to_torch({"vision_align": params}, entries)
