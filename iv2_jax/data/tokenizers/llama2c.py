"""The tokenizer of llama2.c's models (`tok512.bin` and its likes)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from iv2_jax.data.tokenizers import piece_list
from iv2_jax.data.tokenizers.base import Side, require_file, require_size
from iv2_jax.data.tokenizers.language_model import LlmTokenizer
from iv2_jax.errors import DataError

# llama2.c writes the special pieces with a line feed on each side; ids are always these.
_SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}


class Llama2cTokenizer(LlmTokenizer):
    """Pieces with scores; a space is put before every text that does not begin with one."""

    def __init__(
        self,
        path: str | Path | None,
        *,
        max_length: int = 256,
        pad_id: int = 0,
        add_bos: bool = True,
        add_eos: bool = False,
        side: Side = "right",
        vocab_size: int | None = None,
    ) -> None:
        """Reads the file; options as of `ChatTokenizer`.

        Raises:
            DataError: the file is missing or is no list of pieces.
        """
        path = require_file(path, "tokenizer of llama2.c")
        pieces, scores = _read(path)
        require_size(path, len(pieces), vocab_size)
        types = [piece_list.NORMAL] * len(pieces)
        types[0], types[1], types[2] = (piece_list.UNKNOWN, *[piece_list.CONTROL] * 2)
        pieces[:3] = _SPECIALS
        for index, piece in enumerate(pieces):
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                types[index] = piece_list.BYTE
        pieces = [
            piece.replace(" ", "\u2581") if kind == piece_list.NORMAL else piece
            for piece, kind in zip(pieces, types, strict=True)
        ]
        self._processor = piece_list.make_processor(pieces, scores, types, str(path))
        self.specials = dict(list(_SPECIALS.items())[1:])
        self.bos_id, self.eos_id = 1, 2
        super().__init__(
            max_length=max_length,
            vocab_size=len(pieces),
            pad_id=pad_id,
            before=[self.bos_id] if add_bos else [],
            after=[self.eos_id] if add_eos else [],
            side=side,
        )

    def _ids(self, text: str) -> list[int]:
        """Pieces of the text; it has no special tokens, as these models have no chat."""
        if not text:
            return []
        return self._processor.encode(text if text.startswith(" ") else " " + text)

    def tokenize_parts(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Gives the ids of texts in a row."""
        return self.tokenize("".join(part for part, _ in parts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Gives the text of ids `(L,)`; special tokens and the first space are left out."""
        return self._processor.decode([int(i) for i in ids if i > 2]).removeprefix(" ")


def _read(path: Path) -> tuple[list[str], list[float]]:
    """Pieces and scores: a maximum length, then score, length and bytes of each."""
    raw = path.read_bytes()
    pieces, scores, at = [], [], 4
    try:
        while at < len(raw):
            score, length = struct.unpack_from("<fi", raw, at)
            at += 8
            if not 0 <= length <= len(raw) - at:
                raise ValueError(f"a piece of {length} bytes at byte {at}")
            pieces.append(raw[at : at + length].decode("utf-8"))
            scores.append(score)
            at += length
    except (struct.error, ValueError) as error:
        raise DataError(f"{path} is no tokenizer of llama2.c: {error}") from error
    if len(pieces) < 4:
        raise DataError(f"{path} is no tokenizer of llama2.c: it has {len(pieces)} pieces")
    return pieces, scores
