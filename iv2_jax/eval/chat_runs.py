"""Chat models of runs and imported checkpoints, with what turns clips and questions into arrays."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from iv2_jax import config as config_lib
from iv2_jax.data.instruct.sequence import SequenceBuilder, SequenceConfig
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.prompts import BridgeText
from iv2_jax.data.tiles import TilingConfig
from iv2_jax.data.tokenizers.base import Tokenizer
from iv2_jax.errors import ConfigError
from iv2_jax.interop import chat_tokenizer, run_config
from iv2_jax.models import kinds
from iv2_jax.models.chat import Chat, ChatConfig
from iv2_jax.train import checkpoint as checkpoint_lib

_POSITIONS = 4096  # of a prompt, where neither a run nor the language model says


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A chat model that can be asked.

    Attributes:
      name: where it comes from.
      config: its shape.
      params: host arrays.
      talk: how clips and questions become arrays.
      builder: turns conversations into sequences.
      bridge: tokenizer of the Q-Former and what it is told; None for nothing.
      seed: of its run.
    """

    name: str
    config: ChatConfig
    params: Any
    talk: TalkConfig
    builder: SequenceBuilder
    bridge: tuple[Tokenizer, BridgeText] | None
    seed: int = 0

    @property
    def model(self) -> Chat:
        """The Flax module."""
        return Chat(self.config)


def open_chat(
    path: str | Path, *, tokenizer: str = "", template: str = "", ema: bool = False
) -> ChatModel:
    """Opens a chat model.

    Args:
      path: a run of stage 3 or what `iv2 import` made of a released chat model: workdir or step
        folder.
      tokenizer: see `TalkConfig.tokenizer`; empty takes the run's. Imported checkpoints have none.
      template: name of a chat template (`data.prompts.TEMPLATES`); empty takes the run's.
      ema: the moving averages instead of the parameters.

    Raises:
      CheckpointError: there is no checkpoint, or it cannot be read.
      ConfigError: it is no chat model, or it does not say which tokenizer and template it was
        trained with and they are not given.
      DataError: the tokenizer's files are not there or are another model's.
    """
    params, values = checkpoint_lib.load_params(path, ema=ema)
    config = run_config.read_run(values)
    if not isinstance(config, ChatConfig):
        raise ConfigError(
            f"{path} holds a model of kind {kinds.of(config).name!r}; a chat needs one of kind "
            "'chat'"
        )
    talk = _talk(str(path), config, values.get("talk"), tokenizer, template)
    builder = talk.make_builder()
    if builder.tokenizer.vocab_size > config.llm.vocab_size:
        raise ConfigError(
            f"tokenizer {talk.tokenizer!r} has {builder.tokenizer.vocab_size} tokens, the language "
            f"model of {path} {config.llm.vocab_size}: it belongs to another model"
        )
    bridge = talk.make_bridge() if config.bridge.text else None
    return ChatModel(str(path), config, params, talk, builder, bridge, values.get("seed", 0))


def _talk(path: str, config: ChatConfig, values: Any, tokenizer: str, template: str) -> TalkConfig:
    """The run's way to talk with what is given on top; for imported models, what is given."""
    if values is not None:
        values = chat_tokenizer.found_beside(values, path)
        talk = config_lib.build(TalkConfig, values, "config.talk")
        sequence = talk.sequence
        if template:
            sequence = dataclasses.replace(sequence, template=template)
        return dataclasses.replace(talk, tokenizer=tokenizer or talk.tokenizer, sequence=sequence)
    missing = [
        flag for flag, value in (("--tokenizer", tokenizer), ("--template", template)) if not value
    ]
    if missing:
        raise ConfigError(
            f"{path} does not say how it was talked to in training: give {' and '.join(missing)} "
            "(such as --tokenizer mistral_folder --template mistral_v3)"
        )
    if config.encoder is None:
        raise ConfigError(f"{path} has no video encoder (config.encoder is None): it sees no clips")
    return TalkConfig(
        tokenizer=tokenizer,
        sequence=SequenceConfig(
            template=template,
            max_length=config.llm.context_length or _POSITIONS,
            tokens_per_view=config.bridge.num_tokens,
        ),
        frames=config.encoder.num_frames,
        size=config.encoder.image_size,
    )


def with_views(
    chat: ChatModel, *, frames: int | None = None, tiles: int | None = None
) -> ChatModel:
    """The model seeing clips otherwise than its run did.

    Args:
      chat: of `open_chat`.
      frames: T of a video; the encoder's positions are interpolated (spec stage3 trap 33). None as
        it is.
      tiles: most tiles of a clip, beside which it sees the whole of it (the HD models' have 6); 0
        for one centre view, None as it is.

    Raises:
      ConfigError: a number is out of range, or the model has no video encoder.
    """
    from iv2_jax.interop.fitting import resize_positions

    config, params, talk = chat.config, chat.params, chat.talk
    if tiles is not None:
        tiling = TilingConfig(tile_size=talk.size, max_tiles=tiles) if tiles else None
        talk = dataclasses.replace(talk, tiling=tiling)
    if frames is not None:
        talk = dataclasses.replace(talk, frames=frames)
        if config.encoder is None:
            raise ConfigError(f"{chat.name} has no video encoder (config.encoder is None)")
        if frames != config.encoder.num_frames:
            encoder = dataclasses.replace(config.encoder, num_frames=frames)
            fitted = resize_positions(params["encoder"], config.encoder, encoder)
            config, params = dataclasses.replace(config, encoder=encoder), {**params}
            params["encoder"] = fitted
    return dataclasses.replace(chat, config=config, params=params, talk=talk)
