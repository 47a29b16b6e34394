"""The tokenizer that is imported with a chat model, so that `iv2 chat` needs no more flags."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iv2_jax import config as config_lib
from iv2_jax.data.instruct.sequence import SequenceConfig
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.package_files import PREFIX
from iv2_jax.errors import ConfigError
from iv2_jax.models.chat import ChatConfig

BESIDE = "workdir:"  # in front of a path: it is meant from the checkpoint's workdir on
_FOLDER = "tokenizer"
_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# How the released models' own `chat()` writes prompts (spec stage3 4.1, 4.2).
_RELEASED = {
    "internvideo2_chat_8b": "mistral_v3",
    "internvideo2_chat_8b_merged": "mistral_v3",
    "internvideo2_chat_8b_f16": "mistral_v3",
    "internvideo2_chat_8b_internlm2_5": "internlm2_5",
}


def talk_of(config: Any, model: str | None, tokenizer: str, template: str) -> TalkConfig:
    """How an imported chat model is talked to, checked before its weights are read.

    Args:
        config: the model's.
        model: its name in the zoo, if it has one.
        tokenizer: Hugging Face folder or a file in it, `.gguf` or `.bin` file, or
            `package:NAME/FILE`.
        template: of the chat; empty for the released models' own.

    Returns:
        The settings, their tokenizer as it was given.

    Raises:
        ConfigError: the model is no chat model, the template is not given, or the tokenizer has
            more tokens than the model.
        DataError: the tokenizer cannot be read.
    """
    if not isinstance(config, ChatConfig):
        raise ConfigError("--tokenizer and --template are for chat models; leave them out")
    if config.encoder is None:
        raise ConfigError("--tokenizer: this model takes features of another encoder, no clips")
    if not tokenizer:
        raise ConfigError("--template needs --tokenizer")
    released = _RELEASED.get(model or "")
    if not template and not released:
        raise ConfigError("--tokenizer needs --template, the way the chat is written")
    if not tokenizer.startswith(PREFIX):
        path = Path(tokenizer).expanduser().absolute()
        tokenizer = str(path.parent if path.name in _FILES else path)
    sequence = SequenceConfig(
        template or released,
        max_length=config.llm.context_length or 4096,
        tokens_per_view=config.bridge.num_tokens,
        compat="released_chat" if released in ("", template or released) else "none",
    )
    encoder = config.encoder
    talk = TalkConfig(tokenizer, sequence, frames=encoder.num_frames, size=encoder.image_size)
    found, wanted = talk.make_tokenizer().vocab_size, config.llm.vocab_size
    if found > wanted:
        raise ConfigError(
            f"tokenizer {tokenizer!r} has {found} tokens, the model {wanted}: it is another model's"
        )
    return talk


def saved(talk: TalkConfig) -> dict[str, Any]:
    """Plain values to keep with the checkpoint, as `copy_files` places the tokenizer."""
    if Path(talk.tokenizer).is_dir():
        talk = dataclasses.replace(talk, tokenizer=f"{BESIDE}{_FOLDER}")
    return config_lib.to_dict(talk)


def copy_files(talk: TalkConfig, workdir: str | Path) -> None:
    """Copies a folder's tokenizer files beside a checkpoint.

    Files that hold a whole model (`.gguf`) and those of packages stay where they are.
    """
    folder = Path(talk.tokenizer)
    if not folder.is_dir():
        return
    target = Path(workdir) / _FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def found_beside(values: Mapping[str, Any], checkpoint: str | Path) -> dict[str, Any]:
    """Settings of a checkpoint with the tokenizer's path where the checkpoint is now.

    Args:
        values: plain values of a `TalkConfig`.
        checkpoint: workdir, its `checkpoints` folder, or a step folder in it.
    """
    from iv2_jax.train.checkpoint import FOLDER

    values = dict(values)
    name = values.get("tokenizer")
    if isinstance(name, str) and name.startswith(BESIDE):
        path = Path(checkpoint).absolute()
        places = [p for p in (path, *path.parents[:2]) if (p / FOLDER).is_dir()]
        values["tokenizer"] = str((places or [path])[0] / name.removeprefix(BESIDE))
    return values
