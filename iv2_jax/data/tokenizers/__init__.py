"""Tokenizers of the family's text models; NumPy in, NumPy out, and no JAX.

Vocabularies belong to the released models and are not part of this package: each tokenizer reads
the file it is given, and refuses a file that is another model's.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iv2_jax.errors import ConfigError, nearest

if TYPE_CHECKING:
    from iv2_jax.data.tokenizers.base import Tokenizer

# Kind -> module and class; imported on demand, since each needs a library of its own.
KINDS: dict[str, tuple[str, str]] = {
    "bert": ("wordpiece", "BertTokenizer"),
    "llama_clip": ("pieces", "LlamaClipTokenizer"),
    "mobileclip": ("clip_bpe", "ClipTokenizer"),
    "sentencepiece_chat": ("pieces", "ChatTokenizer"),
    "json": ("json_file", "JsonTokenizer"),
    "gguf": ("gguf", "GgufTokenizer"),
    "llama2c": ("llama2c", "Llama2cTokenizer"),
}


def load(kind: str, path: str | Path | None, **options: Any) -> Tokenizer:
    """Makes a tokenizer.

    Args:
        kind: one of `KINDS`: 'bert' (stage 2, Q-Former), 'llama_clip' (CLIP 1B and 6B),
            'mobileclip' (CLIP S, B, L), 'sentencepiece_chat', 'json', 'gguf' and 'llama2c'
            (language models).
        path: its vocabulary file; None only for 'mobileclip', which then takes the one in the
            package open_clip_torch.
        **options: of the class, such as `max_length`.

    Returns:
        The tokenizer; it can be pickled, so loader workers may hold it.

    Raises:
        ConfigError: the kind is unknown, an option is wrong or a library is not installed.
        DataError: the file is missing or is not the vocabulary that the kind needs.
    """
    if kind not in KINDS:
        raise ConfigError(f"no kind of tokenizer is named {kind!r}{nearest(kind, KINDS)}")
    module, name = KINDS[kind]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)(path, **options)
