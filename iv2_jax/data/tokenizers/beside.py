"""The tokenizer that comes with a language model: in its GGUF file or beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iv2_jax.data import tokenizers
from iv2_jax.data.package_files import resolve
from iv2_jax.data.tokenizers.language_model import LlmTokenizer
from iv2_jax.errors import DataError

_NAMES = ("tokenizer_config.json", "special_tokens_map.json")


def tokenizer_of(model: str | Path, **options: Any) -> LlmTokenizer:
    """Makes the tokenizer of a language model.

    Args:
        model: a `.gguf` file, a Hugging Face folder with `tokenizer.json` or `tokenizer.model`, or
            a `tok*.bin` of llama2.c; also `package:NAME/FILE`.
        **options: of the tokenizer's class, such as `max_length`; they win over what the files say.

    Raises:
        DataError: there is no tokenizer, or its files contradict each other.
        ConfigError: a library is not installed, or an option is wrong.
    """
    path = Path(resolve(str(model)))
    if path.is_file() and path.suffix == ".gguf":
        return tokenizers.load("gguf", path, **options)
    if path.is_file() and path.suffix == ".bin":
        return tokenizers.load("llama2c", path, **options)
    if (path / "tokenizer.json").is_file():
        return tokenizers.load("json", path / "tokenizer.json", **_special_names(path) | options)
    if (path / "tokenizer.model").is_file():
        return tokenizers.load("sentencepiece_chat", path / "tokenizer.model", **options)
    raise DataError(
        f"{path} has no tokenizer: it is no .gguf or .bin file and no folder with tokenizer.json "
        "or tokenizer.model"
    )


def _special_names(folder: Path) -> dict[str, Any]:
    """Names of the tokens that begin and end, as the files beside `tokenizer.json` give them."""
    found: dict[str, Any] = {}
    for name in _NAMES:
        if not (folder / name).is_file():
            continue
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            for field in ("bos", "eos"):
                token = values.get(f"{field}_token")
                token = token["content"] if isinstance(token, dict) else token
                if token is not None:
                    found.setdefault(field, token)
            if isinstance(values.get("add_bos_token"), bool):
                found.setdefault("add_bos", values["add_bos_token"])
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{folder / name} cannot be read: {error!r}") from error
    return found
