"""What kinds of model there are: config class, Flax module and inputs of each, imported on demand.

A kind is found by the class of a config, so everything that has a config (a checkpoint, an exported
folder, an entry of the zoo) can be built, counted and converted without a chain of `isinstance`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from iv2_jax.errors import ConfigError, nearest

Inputs = Mapping[str, Any]  # name of an argument -> abstract array, or a plain static value


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        name: such as `student`; exported folders carry it.
        config: `module:Class` of its config.
        module: `module:Class` of its Flax module, built as `Class(config)`.
        inputs: gives the arguments of the module's call for a batch of one, abstractly.
        what: one line on what it is.
    """

    name: str
    config: str
    module: str
    inputs: Callable[[Any], Inputs]
    what: str

    @property
    def config_class(self) -> type:
        """The config's class."""
        return resolve(self.config)

    def build(self, config: Any) -> nn.Module:
        """The Flax module of a config."""
        return resolve(self.module)(config)

    def abstract_params(self, config: Any) -> dict[str, Any]:
        """Parameter tree as `jax.ShapeDtypeStruct`s, logical axis names stripped."""
        return meta.unbox(self.boxed_params(config))

    def boxed_params(self, config: Any) -> dict[str, Any]:
        """Parameter tree as boxed `jax.ShapeDtypeStruct`s, with the logical axis names."""
        return jax.eval_shape(partial(self.init_params, config), jax.random.key(0))

    def init_params(self, config: Any, rng: jax.Array) -> dict[str, Any]:
        """Fresh parameters, boxed with their logical axis names; traceable."""

        def zeros(leaf: Any) -> Any:
            is_abstract = isinstance(leaf, jax.ShapeDtypeStruct)
            return jnp.zeros(leaf.shape, leaf.dtype) if is_abstract else leaf

        inputs = jax.tree.map(zeros, dict(self.inputs(config)))
        return self.build(config).init({"params": rng}, **inputs)["params"]


def resolve(path: str) -> Any:
    """Imports `package.module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def get(name: str) -> Kind:
    """The kind of a name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in KINDS:
        raise ConfigError(f"no kind of model is named {name!r}{nearest(name, KINDS)}")
    return KINDS[name]


def of(config: Any) -> Kind:
    """The kind of a config, by its class.

    Raises:
        ConfigError: it is no config of a model.
    """
    cls = type(config)
    path = f"{cls.__module__}:{cls.__qualname__}"
    for kind in KINDS.values():
        if kind.config == path:
            return kind
    raise ConfigError(f"{path} is no config of a model; there are {', '.join(KINDS)}")


def _video(config: Any) -> jax.ShapeDtypeStruct:
    """One normalised clip of the config's size."""
    size = config.image_size
    return jax.ShapeDtypeStruct((1, config.num_frames, size, size, 3), jnp.float32)


def _encoder_inputs(config: Any) -> Inputs:
    return {"video": _video(config)}


def _student_inputs(config: Any) -> Inputs:
    visible = jax.ShapeDtypeStruct((1, config.encoder.num_tokens), jnp.int32)
    return {"video": _video(config.encoder), "visible": visible}


def _videomae_inputs(config: Any) -> Inputs:
    return {"video": _video(config), "return_layers": (-1,)}


def _classifier_inputs(config: Any) -> Inputs:
    return {"video": _video(config.encoder)}


def _bert_inputs(config: Any) -> Inputs:
    context = jax.ShapeDtypeStruct((1, 4, config.context_width), jnp.float32)
    return {"ids": _ids(), "context": context}


def _beats_inputs(config: Any) -> Inputs:
    return {"fbank": jax.ShapeDtypeStruct((1, 64, 64), jnp.float32)}


def _stage2_inputs(config: Any) -> Inputs:
    audio = {} if config.audio is None else _beats_inputs(config.audio)
    return {"video": _video(config.vision.encoder), "ids": _ids(), **audio}


def _text_inputs(config: Any) -> Inputs:
    return {"ids": _ids()}


def _clip_inputs(config: Any) -> Inputs:
    return {"video": _video(config.vision), "ids": _ids()}


def _llm_inputs(config: Any) -> Inputs:
    return {"tokens": _ids()}


def _bridge_inputs(config: Any) -> Inputs:
    context = jax.ShapeDtypeStruct((1, 4, config.context_width), jnp.float32)
    return {"context": context, **({"ids": _ids()} if config.text else {})}


def _bridge_pretraining_inputs(config: Any) -> Inputs:
    return {"video": _video(config.encoder), "ids": _ids()}


def _chat_inputs(config: Any) -> Inputs:
    if config.encoder is None:
        shape = (1, 1, 4, config.bridge.context_width)
        seen = {"features": jax.ShapeDtypeStruct(shape, jnp.float32)}
    else:
        video = _video(config.encoder)
        seen = {"video": jax.ShapeDtypeStruct((1, *video.shape), video.dtype)}
    text = {"bridge_ids": _ids()} if config.bridge.text else {}
    return {"tokens": _ids(), "visual_index": _ids(), **seen, **text}


def _shots_inputs(config: Any) -> Inputs:
    shape = (1, 8, config.frame_height, config.frame_width, 3)
    return {"frames": jax.ShapeDtypeStruct(shape, jnp.float32)}


def _ids() -> jax.ShapeDtypeStruct:
    """One text of eight tokens."""
    return jax.ShapeDtypeStruct((1, 8), jnp.int32)


_M = "iv2_jax.models"

KINDS: dict[str, Kind] = {
    name: Kind(name, f"{_M}.{module}:{config}", f"{_M}.{module}:{network}", inputs, what)
    for name, module, config, network, inputs, what in (
        (
            "encoder",
            "video_encoder",
            "EncoderConfig",
            "VideoEncoder",
            _encoder_inputs,
            "video encoder with its attention pool",
        ),
        (
            "student",
            "student",
            "StudentConfig",
            "Student",
            _student_inputs,
            "video encoder with alignment heads (stage 1, distillation)",
        ),
        (
            "videomae",
            "teachers.videomae",
            "VideoMAEConfig",
            "VideoMAE",
            _videomae_inputs,
            "VideoMAEv2, a teacher",
        ),
        (
            "classifier",
            "classifier",
            "ClassifierConfig",
            "Classifier",
            _classifier_inputs,
            "video encoder with a classifier head",
        ),
        (
            "bert",
            "text.bert",
            "BertConfig",
            "Bert",
            _bert_inputs,
            "BERT with fusion layers and masked-LM head",
        ),
        ("beats", "audio.beats", "BeatsConfig", "Beats", _beats_inputs, "BEATs audio encoder"),
        (
            "stage2",
            "stage2",
            "Stage2Config",
            "Stage2",
            _stage2_inputs,
            "stage 2: video, text and maybe audio",
        ),
        (
            "mobileclip",
            "text.mobileclip",
            "MobileClipConfig",
            "MobileClipText",
            _text_inputs,
            "MobileCLIP text tower",
        ),
        (
            "llama_clip",
            "text.llama_clip",
            "LlamaClipConfig",
            "LlamaClipText",
            _text_inputs,
            "LLaMA-style CLIP text tower",
        ),
        ("clip", "clip", "ClipConfig", "Clip", _clip_inputs, "CLIP, large: video and LLaMA text"),
        (
            "clip_small",
            "clip",
            "SmallClipConfig",
            "Clip",
            _clip_inputs,
            "CLIP, small: video and MobileCLIP text",
        ),
        ("llm", "llm", "LlmConfig", "Llm", _llm_inputs, "causal language model"),
        (
            "bridge",
            "bridge",
            "BridgeConfig",
            "Bridge",
            _bridge_inputs,
            "Q-Former between video encoder and language model",
        ),
        (
            "bridge_pretraining",
            "bridge_pretraining",
            "BridgePretrainingConfig",
            "BridgePretraining",
            _bridge_pretraining_inputs,
            "video encoder, Q-Former and the heads of its pretraining",
        ),
        (
            "chat",
            "chat",
            "ChatConfig",
            "Chat",
            _chat_inputs,
            "dialogue model: video encoder, bridge, language model",
        ),
        (
            "shots",
            "shots.network",
            "ShotConfig",
            "ShotNet",
            _shots_inputs,
            "shot-boundary detector",
        ),
    )
}
