"""The tokenizer inside a GGUF file: GPT-2's byte-level BPE or LLaMA's SentencePiece."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.data.tokenizers import piece_list
from iv2_jax.data.tokenizers.base import Side, require_file, require_library, require_size
from iv2_jax.data.tokenizers.language_model import LlmTokenizer
from iv2_jax.errors import DataError

_META = "tokenizer.ggml."

# How texts are split before bytes are joined: GPT-2's pattern is the library's own; the others
# are those of the models' tokenizer.json.
_GPT2, _DIGITS_THEN_GPT2 = "gpt2", "digits"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
}


class GgufTokenizer(LlmTokenizer):
    """The tokenizer that a language model's GGUF file carries.

    Attributes:
        chat_template: the file's Jinja template of chats, or None.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        max_length: int = 1024,
        pad_id: int | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        side: Side = "right",
        vocab_size: int | None = None,
    ) -> None:
        """Reads the file's header.

        Args:
            path: the `.gguf` file.
            max_length: ids of a row.
            pad_id: fills rows up; None for the file's own, else the unknown token, else 0.
            add_bos: begins every row with the beginning token; None as the file says.
            add_eos: ends every row with the end token; None as the file says.
            side: where rows are padded and texts cut.
            vocab_size: tokens that the file must have; None accepts any number.

        Raises:
            DataError: the file is missing, has no tokenizer or one that is not known here.
            CheckpointError: it is no GGUF file.
            ConfigError: a library is not installed, or an option is wrong.
        """
        from iv2_jax.interop import gguf_file

        path = require_file(path, "GGUF file of the language model")
        metadata = gguf_file.read_header(path).metadata
        tokens: list[str] = _need(metadata, "tokens", path)
        require_size(path, len(tokens), vocab_size)
        types = metadata.get(f"{_META}token_type") or [piece_list.NORMAL] * len(tokens)
        special = (piece_list.UNKNOWN, piece_list.CONTROL, piece_list.USER_DEFINED)
        self.specials = {t: i for i, t in enumerate(tokens) if t and types[i] in special}
        self.chat_template = metadata.get("tokenizer.chat_template")
        self.bos_id = _need(metadata, "bos_token_id", path)
        self.eos_id = _need(metadata, "eos_token_id", path)
        self._special_ids = set(self.specials.values()) | {self.bos_id, self.eos_id}
        # Longest first, so that no token hides one that begins with it.
        names = sorted(self.specials, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else "(?!)()")
        kind = _need(metadata, "model", path)
        if kind == "gpt2":
            self._model: Any = _ByteLevel(metadata, tokens, path)
        elif kind == "llama":
            self._model = _Pieces(metadata, tokens, types, path)
        else:
            raise DataError(f"{path}: {_META}model={kind!r}: 'gpt2' and 'llama' can be read")
        if pad_id is None:
            unknown = metadata.get(f"{_META}unknown_token_id", 0)
            pad_id = metadata.get(f"{_META}padding_token_id", unknown)
        if add_bos is None:
            add_bos = metadata.get(f"{_META}add_bos_token", kind == "llama")
        if add_eos is None:
            add_eos = metadata.get(f"{_META}add_eos_token", False)
        super().__init__(
            max_length=max_length,
            vocab_size=len(tokens),
            pad_id=pad_id,
            before=[self.bos_id] if add_bos else [],
            after=[self.eos_id] if add_eos else [],
            side=side,
        )

    def _ids(self, text: str) -> list[int]:
        """Ids of the text between special tokens, and those."""
        ids: list[int] = []
        for number, part in enumerate(self._split.split(text)):
            if number % 2:
                ids.append(self.specials[part])
            elif part:
                ids += self._model.encode(part, first=number == 0)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Gives the text of ids `(L,)`; special tokens are left out."""
        kept = [int(index) for index in ids]
        return self._model.decode([index for index in kept if index not in self._special_ids])


class _ByteLevel:
    """GPT-2's byte-level BPE, which knows no special tokens."""

    def __init__(self, metadata: Mapping[str, Any], tokens: Sequence[str], path: Path) -> None:
        library = require_library("tokenizers")
        split = metadata.get(f"{_META}pre", "default")
        if split not in _SPLITS:
            raise DataError(
                f"{path}: {_META}pre={split!r} is not known; known: {', '.join(sorted(_SPLITS))}"
            )
        split = _SPLITS[split]
        merges = [tuple(merge.split(" ")) for merge in _need(metadata, "merges", path)]
        try:
            model = library.models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=merges,
                ignore_merges=split == _LLAMA3,
            )
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path}: the merges do not build on each other: {error}") from error
        before, to_bytes = [], {"add_prefix_space": False, "use_regex": split != _LLAMA3}
        if split == _DIGITS_THEN_GPT2:
            before = [library.pre_tokenizers.Digits(individual_digits=True)]
        elif split == _LLAMA3:
            before = [library.pre_tokenizers.Split(library.Regex(_LLAMA3), "isolated")]
        self._tokenizer = library.Tokenizer(model)
        self._tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
            [*before, library.pre_tokenizers.ByteLevel(**to_bytes)]
        )
        self._tokenizer.decoder = library.decoders.ByteLevel()

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class _Pieces:
    """LLaMA's SentencePiece; a space is put before a text's beginning and nowhere else."""

    def __init__(
        self,
        metadata: Mapping[str, Any],
        tokens: Sequence[str],
        types: Sequence[int],
        path: Path,
    ) -> None:
        scores = _need(metadata, "scores", path)
        self._processor = piece_list.make_processor(tokens, scores, types, str(path))
        self._add_space = metadata.get(f"{_META}add_space_prefix", True)

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Ids of a text."""
        is_bare = self._add_space and first and not text.startswith(" ")
        return self._processor.encode(" " + text if is_bare else text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without the first space where one is put."""
        text = self._processor.decode(ids)
        return text.removeprefix(" ") if self._add_space else text


def _need(metadata: Mapping[str, Any], key: str, path: Path) -> Any:
    """A value of the tokenizer's metadata."""
    if f"{_META}{key}" not in metadata:
        raise DataError(f"{path} lacks {_META}{key}: it carries no whole tokenizer")
    return metadata[f"{_META}{key}"]
