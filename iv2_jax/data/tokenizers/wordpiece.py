"""BERT's lower-casing WordPiece tokenizer, as the original calls it (spec stage2 3)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from iv2_jax.data.tokenizers.base import (
    Side,
    Tokenizer,
    require_file,
    require_library,
    require_size,
)
from iv2_jax.errors import DataError

PAD, UNK, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_VOCAB_SIZE = 30522


class BertTokenizer(Tokenizer):
    """Lower case, accents stripped, punctuation and Chinese characters apart, then WordPiece.

    A row is `[CLS]` and the word pieces. There is **no** trailing `[SEP]` unless asked for: the
    released stage-2 models were trained without one, and a further token changes what attention
    gives. The Q-Former of the chat models is called with `trailing_sep=True, side="left"` and the
    further token `[DEC]`.

    Attributes:
        cls_id: begins every row.
        sep_id: ends a row with `trailing_sep`.
        mask_id: takes the place of words in masked-LM training.
        unk_id: a word that no pieces of the vocabulary make.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        max_length: int = 40,
        trailing_sep: bool = False,
        side: Side = "right",
        extra_tokens: Sequence[str] = (),
        vocab_size: int | None = BERT_VOCAB_SIZE,
    ) -> None:
        """Reads the vocabulary.

        Args:
            path: `vocab.txt` of bert-large-uncased (or base: they are equal), one token a line.
            max_length: ids of a row, `[CLS]` included.
            trailing_sep: ends every text with `[SEP]`, as stock BERT does.
            side: where rows are padded and texts cut.
            extra_tokens: further special tokens; their ids follow the vocabulary's.
            vocab_size: tokens that the file must have; None accepts any number.

        Raises:
            DataError: the file is missing, is no vocabulary of BERT, or is one of another size.
            ConfigError: the library `tokenizers` is not installed, or an option is wrong.
        """
        library = require_library("tokenizers")
        vocabulary = _read_vocabulary(require_file(path, "vocab.txt of bert-large-uncased"))
        require_size(Path(path), len(vocabulary), vocab_size)
        model = library.models.WordPiece(
            vocab=vocabulary, unk_token=UNK, max_input_chars_per_word=100
        )
        self._tokenizer = library.Tokenizer(model)
        # Letters are lowered before, in `_ids`.
        self._tokenizer.normalizer = library.normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=False
        )
        self._tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
        self._tokenizer.decoder = library.decoders.WordPiece()
        self._tokenizer.add_special_tokens([*SPECIALS, *extra_tokens])
        specials = "|".join(re.escape(token) for token in (*SPECIALS, *extra_tokens))
        self._special = re.compile(f"({specials})")
        ids = {token: self._tokenizer.token_to_id(token) for token in SPECIALS}
        self.cls_id, self.sep_id, self.mask_id = ids[CLS], ids[SEP], ids[MASK]
        self.unk_id = ids[UNK]
        super().__init__(
            max_length=max_length,
            vocab_size=self._tokenizer.get_vocab_size(),
            pad_id=ids[PAD],
            before=[self.cls_id],
            after=[self.sep_id] if trailing_sep else [],
            side=side,
        )

    def _ids(self, text: str) -> list[int]:
        """Word pieces; special tokens that are written in the text become one id each."""
        # Lowered here and not by the library, which goes letter by letter and so has no final
        # sigma. Odd parts of the split are special tokens, which are in capitals.
        parts = self._special.split(text)
        parts[::2] = [part.lower() for part in parts[::2]]
        return self._tokenizer.encode("".join(parts), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Gives the text of ids `(L,)` in lower case; special tokens are left out."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> id of a vocab.txt."""
    try:
        # Not splitlines: it also cuts at characters that may stand in a token.
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8, so no vocab.txt: {error}") from None
    lines = [line.removesuffix("\r") for line in lines]
    if lines[-1] == "":
        lines.pop()
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(lines):
        if token in vocabulary:
            raise DataError(
                f"{path}, line {number + 1}: token {token!r} stands in line "
                f"{vocabulary[token] + 1} already"
            )
        vocabulary[token] = number
    missing = [token for token in SPECIALS if token not in vocabulary]
    if missing:
        raise DataError(f"{path} is no vocabulary of BERT: it lacks {', '.join(missing)}")
    cased = next((token for token in lines if token != token.lower() and token[0] != "["), None)
    if cased is not None:
        raise DataError(
            f"{path} is a cased vocabulary (line {vocabulary[cased] + 1}: {cased!r}); the models "
            "of this family read lower case"
        )
    return vocabulary
