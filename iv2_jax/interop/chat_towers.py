"""What the parts of a chat model take from weights of any origin (see `tower_recipes`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from iv2_jax.data.package_files import resolve
from iv2_jax.errors import ConfigError
from iv2_jax.interop import entries, families, hf_llm, llama2c_file
from iv2_jax.interop.position_files import file_grid, fit_positions
from iv2_jax.interop.sources import WeightSource
from iv2_jax.interop.taking import (
    ENCODER_FIELDS,
    Taken,
    by,
    check_same,
    encoder_of,
    read_table,
    under,
)
from iv2_jax.interop.text_recipes import from_released_bert, modern_name
from iv2_jax.interop.torch_keys import HEADS
from iv2_jax.interop.torch_keys import chat as chat_keys
from iv2_jax.interop.torch_keys.video import encoder_map
from iv2_jax.models import kinds, lora
from iv2_jax.models.bridge import BridgeConfig
from iv2_jax.models.bridge_pretraining import BridgePretrainingConfig
from iv2_jax.models.chat import ChatConfig
from iv2_jax.models.llm import LlmConfig

_VISION = "vision_encoder."
_BLOCK = re.compile(r"blocks\.(\d+)\..*")
_POOL = {r"clip_projector\..*": "attention pool, which a chat model has not", "temp": "temperature"}
_NO_ADAPTERS = "the source has no adapters; they start at zero"

# Fields of a language model's decoder that change what its weights mean.
_DECODER_FIELDS = (
    *("width", "depth", "num_heads", "num_kv_heads", "head_dim", "mlp_width"),
    *("norm_epsilon", "rope", "sliding_window", "fused_qkv"),
)


def vision(
    source: WeightSource, config: ChatConfig | BridgePretrainingConfig, *, frames: int = 0
) -> Taken:
    """The video encoder: that of a student, a stage-2, CLIP or chat model (spec stage3 2.1).

    Blocks beyond the chat model's (39 of 40 are kept), the pool and all heads are left out;
    positions are interpolated to its frames; a table for images that the source lacks stays fresh.

    Args:
        source: opened weights; keys bare or under `vision_encoder.`.
        config: the model that starts from it.
        frames: frames of the clips that a file's positions are of; 0 finds them.

    Returns:
        The filled parameters under `encoder/`.

    Raises:
        CheckpointError: the encoders do not fit, or something is left over.
        ConfigError: a source of ours has another encoder, or fewer blocks.
    """
    target = config.encoder
    if target is None:
        raise ConfigError("chat.encoder is None: there is nothing that 'vision' could fill")
    known = encoder_of(source.config)
    if known is not None:
        ours = [f for f in ENCODER_FIELDS if f not in ("depth", "pool_heads", "pool_width")]
        check_same(known, target, ours, "vision", source)
        if known.depth < target.depth:
            raise ConfigError(
                f"{source.path} has {known.depth} blocks, chat.encoder.depth is {target.depth}"
            )
        frames = known.num_frames
    tensors, others = source.under(_VISION)
    tensors = {re.sub(r"(\.ls[12])$", r"\1.gamma", key): value for key, value in tensors.items()}
    grid = file_grid(tensors, target, frames=frames)
    tensors = dict(fit_positions(tensors, target, frames=frames))
    beyond = [k for k in tensors if (m := _BLOCK.fullmatch(k)) and int(m[1]) >= target.depth]
    for key in beyond:
        del tensors[key]
    table, fresh = [], {}
    for entry in encoder_map(target):
        if entry.path.startswith("img_") and not any(key in tensors for key in entry.torch_keys):
            fresh[f"encoder/{entry.path}"] = "the source has none"
        else:
            table.append(entry)
    flat = read_table(tensors, table, HEADS | _POOL, source)
    notes = []
    if grid not in (None, target.grid):
        notes.append(f"positions {by(grid)} -> {by(target.grid)} patches")
    if beyond:
        notes.append(f"blocks from {target.depth} on left out")
    if others:
        notes.append(f"{others} keys outside of {_VISION} left out")
    return Taken(under("encoder", flat), fresh, tuple(notes))


def is_plain_llm(path: str) -> bool:
    """Whether a path is a language model by itself: a GGUF or llama2.c file, or a HF folder."""
    place = Path(resolve(path))
    return hf_llm.is_llm_source(place) or (place.is_file() and place.suffix == llama2c_file.ENDING)


def plain_llm(path: str, config: ChatConfig) -> Taken:
    """The language model, from a file or folder of its own.

    Adapters of the chat model stay fresh, which changes nothing, as they start at zero.

    Args:
        path: Hugging Face folder, `.gguf` file or llama2.c's `.bin`, or `package:NAME/FILE`.
        config: the model that starts from it.

    Returns:
        The filled parameters under `llm/`.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it is another model than `chat.llm`; names the fields.
    """
    place = Path(resolve(path))
    known, params = hf_llm.load_llm(place, dtype=_dtype(config))
    _check_llm(known, config.llm, place)
    flat = traverse_util.flatten_dict(params, sep="/")
    return Taken(under("llm", flat), _fresh_adapters(config, under("llm", flat)))


def llm_of_chat(source: WeightSource, config: ChatConfig) -> Taken:
    """The language model of a chat model or of a run of ours; see `plain_llm`."""
    known = getattr(source.config, "llm", source.config)
    if isinstance(known, LlmConfig):
        _check_llm(known, config.llm, source.path)
    if isinstance(source.config, LlmConfig):
        flat = under("llm", _ours(source, source.config))
    else:
        flat = _chat(source, config, "llm/")
    return Taken(flat, _fresh_adapters(config, flat))


def bridge(source: WeightSource, config: ChatConfig | BridgePretrainingConfig) -> Taken:
    """The bridge: of a chat model, of the Q-Former's own pretraining, or BERT's (spec stage3 2.2).

    From BERT's layout, the queries' feed-forward starts as the text's; cross-attention, queries and
    projections stay fresh. Of a Q-Former's file may be missing: the extra queries, the projections,
    and the text side.

    Args:
        source: opened weights.
        config: the model that starts from it.

    Returns:
        The filled parameters under `bridge/`.

    Raises:
        CheckpointError: anything else is missing or of another shape.
        ConfigError: a source of ours has another bridge than `config` says.
    """
    known = getattr(source.config, "bridge", source.config)
    if isinstance(known, BridgeConfig):
        fields = ("width", "depth", "num_heads", "cross_every", "epsilon")
        check_same(known, config.bridge, fields, "bridge", source)
        if isinstance(source.config, BridgeConfig):
            return Taken(under("bridge", _ours(source, known)), {})
    table = chat_keys.bridge_map(config.bridge)
    if not any("query_tokens" in key for key in source.tensors):
        return _from_bert(source, config.bridge, table)
    tensors = source.tensors
    if "mistral_proj.weight" in tensors or "llama_proj.weight" in tensors:
        name = "mistral_proj" if "mistral_proj.weight" in tensors else "llama_proj"
        table = chat_keys.bridge_map(config.bridge, projection=name)
    wanted, fresh = [], {}
    for entry in entries.parameters(table):
        has = any(key in tensors for key in entry.all_keys)
        if not has and re.fullmatch(_MAY_MISS, entry.path):
            fresh[f"bridge/{entry.path}"] = "the source has none"
        else:
            wanted.append(entry)
    ignore = chat_keys.BESIDE_BRIDGE | {
        r"project_(up|down)\..*|(mistral|llama)_proj\..*": "projection of another model",
        r"extra_query_tokens": "queries that the model lacks",
    }
    if not config.bridge.text:
        ignore |= {_TEXT_SIDE: "text side, which the model lacks"}
    return Taken(under("bridge", read_table(tensors, wanted, ignore, source)), fresh)


def bridge_to_pretrain(source: WeightSource, config: BridgePretrainingConfig) -> Taken:
    """What a Q-Former's pretraining starts from, from the same sources as `bridge`.

    Projections to a language model are left out. From BERT's layout the language head starts as
    BERT's, where the file has it; its score of words that BERT lacks (`[DEC]`) starts at zero.

    Args:
        source: opened weights.
        config: the model that starts from it.

    Returns:
        The filled parameters under `bridge/` and `lm_head/`.

    Raises:
        UserError: as `bridge`.
    """
    taken = bridge(source, config)
    params = {k: v for k, v in taken.params.items() if not k.startswith("bridge/project_")}
    fresh = {k: why for k, why in taken.fresh.items() if not k.startswith("bridge/project_")}
    head = {
        f"qformer.{modern_name(key)}": np.asarray(value)
        for key, value in source.tensors.items()
        if key.startswith("cls.predictions.") and ".decoder." not in key
    }
    if not head:
        return Taken(params, fresh, taken.notes)
    bias = "qformer.cls.predictions.bias"
    if bias in head:
        more = config.bridge.vocab_size - len(head[bias])
        head[bias] = np.pad(head[bias], (0, max(more, 0)))
    table = chat_keys.bridge_pretraining_map(config)
    wanted = [entry for entry in table if entry.path.startswith("lm_head/")]
    return Taken(params | read_table(head, wanted, {}, source), fresh, taken.notes)


def whole_pretraining(source: WeightSource, config: BridgePretrainingConfig) -> Taken:
    """A whole run of a Q-Former's pretraining, at another number of frames maybe.

    Raises:
        CheckpointError: it is none, or something is missing, left over or of another shape.
        ConfigError: it has another encoder than `config` says.
    """
    known = encoder_of(source.config)
    if known is not None:
        check_same(known, config.encoder, ENCODER_FIELDS, "vision", source)
    frames = getattr(known, "num_frames", 0)
    tensors = fit_positions(source.tensors, config.encoder, frames=frames, prefix=_VISION)
    table = chat_keys.bridge_pretraining_map(config)
    return Taken(read_table(tensors, table, {}, source), {})


_TEXT_SIDE = (
    r"qformer\.bert\.(embeddings\.(word|position)_embeddings"
    r"|encoder\.layer\.\d+\.(intermediate|output))\..*"
)
_MAY_MISS = r"extra_query_tokens|project_(up|down)/.*|embeddings/(word|position)|.*/mlp/.*"


def _from_bert(source: WeightSource, config: BridgeConfig, table: list[entries.Entry]) -> Taken:
    """The parts of the bridge that are BERT's."""
    drawn = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), kinds.of(config).abstract_params(config)
    )
    if config.text:  # BERT has fewer words; all else that it has not stays out
        word = drawn["embeddings"]["word"]
        word += (0.02 * np.random.default_rng(0).normal(size=word.shape)).astype(word.dtype)
    # The head of BERT's own training has no place in a bridge.
    tensors = {k: v for k, v in source.tensors.items() if not k.startswith("cls.")}
    params = from_released_bert(tensors, table, drawn, source=str(source.path))
    flat = traverse_util.flatten_dict(params, sep="/")
    own = {
        entry.path
        for entry in entries.parameters(table)
        if not re.match(r"qformer\.bert\.(?!.*\.crossattention\.)", entry.torch_keys[0])
    }
    kept = {path: value for path, value in flat.items() if path not in own}
    return Taken(under("bridge", kept), {f"bridge/{path}": "BERT has none" for path in own})


def whole_chat(source: WeightSource, config: ChatConfig) -> Taken:
    """A whole chat model, at another number of frames maybe; adapters may be added.

    Raises:
        CheckpointError: something is missing, left over or of another shape.
        ConfigError: a source of ours has other parts than `config` says.
    """
    known = source.config
    if isinstance(known, ChatConfig):
        _check_llm(known.llm, config.llm, source.path)
        if known.encoder is not None and config.encoder is not None:
            check_same(known.encoder, config.encoder, ENCODER_FIELDS, "vision", source)
    flat = _chat(source, config, "")
    return Taken(flat, _fresh_adapters(config, flat))


def _chat(source: WeightSource, config: ChatConfig, part: str) -> dict[str, np.ndarray]:
    """Parameters of a chat model's source, those under `part` alone, by the keys it has."""
    adapted = any(".lora_" in key for key in source.tensors)
    if adapted and config.llm.decoder.lora is None:
        raise ConfigError(
            f"{source.path} has adapters and chat.llm none: set chat.llm.decoder.lora and "
            "lora_targets as they were trained"
        )
    if not adapted:
        config = dataclasses.replace(config, llm=config.llm.without_lora())
    tensors: Mapping[str, Any] = source.tensors
    if config.encoder is not None:
        frames = getattr(encoder_of(source.config), "num_frames", 0)
        tensors = fit_positions(tensors, config.encoder, frames=frames, prefix=_VISION)
    tensors, table = families.of(config).to_read(config, tensors)
    wanted = [entry for entry in entries.parameters(table) if entry.path.startswith(part)]
    keys = {key for entry in wanted for key in entry.all_keys}
    if part:
        tensors = {key: value for key, value in tensors.items() if key in keys}
    return read_table(tensors, wanted, families.of(config).ignorable(), source)


def _ours(source: WeightSource, config: Any) -> dict[str, np.ndarray]:
    """Parameters of a source of ours by its own config."""
    family = families.of(config)
    tensors, table = family.to_read(config, source.tensors)
    return read_table(tensors, table, family.ignorable(), source)


def _check_llm(theirs: LlmConfig, ours: LlmConfig, where: Path) -> None:
    """Refuses another language model, naming the fields."""
    pairs = [
        (f"decoder.{name}", getattr(theirs.decoder, name), getattr(ours.decoder, name))
        for name in _DECODER_FIELDS
    ]
    pairs += [(n, getattr(theirs, n), getattr(ours, n)) for n in ("vocab_size", "tied_head")]
    differ = [f"{name} is {a}, chat.llm has {b}" for name, a, b in pairs if a != b]
    if differ:
        raise ConfigError(f"{where} is another language model: {'; '.join(differ)}")


def _fresh_adapters(config: ChatConfig, filled: Mapping[str, Any]) -> dict[str, str]:
    """Adapters of the model that are not filled."""
    missing = [path for path in _adapters(config) if path not in filled]
    return dict.fromkeys(missing, _NO_ADAPTERS)


@cache
def _adapters(config: ChatConfig) -> tuple[str, ...]:
    """Paths of the model's adapters."""
    params = traverse_util.flatten_dict(kinds.of(config).abstract_params(config), sep="/")
    return tuple(path for path in params if path.rsplit("/", 1)[-1] in lora.NAMES)


def _dtype(config: ChatConfig) -> np.dtype:
    """Dtype in which the language model is kept, so that no larger copy is made of it."""
    return jax.numpy.dtype(config.llm.decoder.precision.param_dtype)
