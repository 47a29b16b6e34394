"""Language models' tokenizers from their `tokenizer.json` (Mistral v0.3, InternLM2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from iv2_jax.data.tokenizers.base import (
    Side,
    require_file,
    require_library,
    require_size,
)
from iv2_jax.data.tokenizers.language_model import LlmTokenizer
from iv2_jax.errors import DataError


class JsonTokenizer(LlmTokenizer):
    """What a `tokenizer.json` describes; special tokens written in the text become one id each.

    Attributes:
        bos_id: begins a sequence.
        eos_id: ends an answer.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        max_length: int = 1024,
        bos: str = "<s>",
        eos: str = "</s>",
        pad_id: int = 0,
        add_bos: bool = True,
        add_eos: bool = False,
        side: Side = "right",
        vocab_size: int | None = None,
    ) -> None:
        """Reads the file.

        Args:
            path: `tokenizer.json` of the language model.
            max_length: ids of a row.
            bos: name of the token that begins a sequence.
            eos: name of the token that ends an answer.
            pad_id: fills rows up; Mistral's released chat model uses the unknown token, 0.
            add_bos: begins every row with the beginning token.
            add_eos: ends every row with the end token.
            side: where rows are padded and texts cut.
            vocab_size: tokens that the file must have; None accepts any number.

        Raises:
            DataError: the file is missing, is no tokenizer, lacks `bos` or `eos`, or is one of
                another size.
            ConfigError: the library `tokenizers` is not installed, or an option is wrong.
        """
        library = require_library("tokenizers")
        path = require_file(path, "tokenizer.json of the language model")
        try:
            self._tokenizer = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path} is no tokenizer.json: {error}") from error
        # A file may ask for truncation or padding; both are the base class's work.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        require_size(path, self._tokenizer.get_vocab_size(), vocab_size)
        ids = {name: self._tokenizer.token_to_id(name) for name in (bos, eos)}
        missing = [name for name, index in ids.items() if index is None]
        if missing:
            raise DataError(f"{path} has no token {' and no token '.join(map(repr, missing))}")
        self.bos_id, self.eos_id = ids[bos], ids[eos]
        added = self._tokenizer.get_added_tokens_decoder().items()
        self.specials = {token.content: index for index, token in added}
        super().__init__(
            max_length=max_length,
            vocab_size=self._tokenizer.get_vocab_size(),
            pad_id=pad_id,
            before=[self.bos_id] if add_bos else [],
            after=[self.eos_id] if add_eos else [],
            side=side,
        )

    def _ids(self, text: str) -> list[int]:
        """Ids of the text; the file's own template is not used, `before` and `after` are."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Gives the text of ids `(L,)`; special tokens and padding are left out."""
        kept = [int(index) for index in ids if index != self.pad_id]
        return self._tokenizer.decode(kept, skip_special_tokens=True)
