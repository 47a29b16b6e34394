"""SentencePiece tokenizers: the LLaMA-style CLIP text tower's and those of language models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from iv2_jax.data.tokenizers.base import (
    Side,
    Tokenizer,
    require_file,
    require_library,
    require_size,
)
from iv2_jax.data.tokenizers.language_model import LlmTokenizer
from iv2_jax.errors import DataError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

LLAMA_CLIP_VOCAB_SIZE = 49954


class LlamaClipTokenizer(Tokenizer):
    """The tokenizer of CLIP 1B and 6B (spec stage2 7.2).

    A row is the beginning token, the pieces of "summarize:" and the text without a space between,
    the end token and zeros. Case and spaces stay as they are. Padding has the id of the unknown
    token, 0; the tower finds the place of its feature by counting the ids above 0, and since
    unknown characters are spelt in bytes, id 0 stands for padding alone.

    Attributes:
        bos_id: begins every row.
        eos_id: ends every row, however long the text.
    """

    PROMPT = "summarize:"

    def __init__(
        self,
        path: str | Path | None,
        *,
        max_length: int = 80,
        vocab_size: int | None = LLAMA_CLIP_VOCAB_SIZE,
    ) -> None:
        """Reads the model.

        Args:
            path: `tokenizer.model` of chinese_alpaca_lora_7b.
            max_length: ids of a row, special tokens included.
            vocab_size: pieces that the model must have; None accepts any number.

        Raises:
            DataError: the file is missing, is no SentencePiece model, or is one of another size.
            ConfigError: an option is wrong.
        """
        self._processor = _read_model(path, "tokenizer.model of chinese_alpaca_lora_7b", vocab_size)
        self.bos_id, self.eos_id = _special_ids(Path(path), self._processor)
        super().__init__(
            max_length=max_length,
            vocab_size=self._processor.vocab_size(),
            pad_id=0,
            before=[self.bos_id],
            after=[self.eos_id],
        )

    def _ids(self, text: str) -> list[int]:
        """Pieces of the prompt and the text."""
        return self._processor.encode(self.PROMPT + text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Gives the text of ids `(L,)` without the prompt."""
        return _decode(self._processor, ids).removeprefix(self.PROMPT)


class ChatTokenizer(LlmTokenizer):
    """A language model's tokenizer from its SentencePiece file (Mistral, LLaMA, Vicuna).

    Control tokens that are written in the text (`</s>`, `[INST]` where it is one) become one id
    each. A space is put before a text that does not begin with one or with a control token, and
    nowhere else, which is what the released chat models' fast tokenizers do (spec stage3 4.1).

    Attributes:
        bos_id: begins a sequence.
        eos_id: ends an answer.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        max_length: int = 1024,
        pad_id: int = 0,
        add_bos: bool = True,
        add_eos: bool = False,
        side: Side = "right",
        vocab_size: int | None = None,
    ) -> None:
        """Reads the model.

        Args:
            path: `tokenizer.model` of the language model.
            max_length: ids of a row.
            pad_id: fills rows up; the released models use the unknown token, 0.
            add_bos: begins every row with the beginning token.
            add_eos: ends every row with the end token.
            side: where rows are padded and texts cut.
            vocab_size: pieces that the model must have; None accepts any number.

        Raises:
            DataError: the file is missing, is no SentencePiece model, or is one of another size.
            ConfigError: an option is wrong.
        """
        what = "tokenizer.model of the language model"
        self._processor = _read_model(path, what, vocab_size, add_space=False)
        self.bos_id, self.eos_id = _special_ids(Path(path), self._processor)
        count = self._processor.vocab_size()
        self.specials = {
            self._processor.id_to_piece(index): index
            for index in range(count)
            if self._processor.is_control(index) or self._processor.is_unknown(index)
        }
        # Longest first, so that no control token hides one that begins with it.
        names = sorted(self.specials, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        super().__init__(
            max_length=max_length,
            vocab_size=count,
            pad_id=pad_id,
            before=[self.bos_id] if add_bos else [],
            after=[self.eos_id] if add_eos else [],
            side=side,
        )

    def _ids(self, text: str) -> list[int]:
        """Pieces, and control tokens as such."""
        ids: list[int] = []
        for number, part in enumerate(self._split.split(text)):
            if number % 2:
                ids.append(self.specials[part])
            elif part:
                is_bare = number == 0 and not part.startswith(" ")
                ids += self._processor.encode(" " + part if is_bare else part)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Gives the text of ids `(L,)`; control tokens are left out, as is a first space."""
        return _decode(self._processor, ids).removeprefix(" ")


def _read_model(
    path: str | Path | None, what: str, vocab_size: int | None, *, add_space: bool = True
) -> SentencePieceProcessor:
    """Loads a SentencePiece model.

    Args:
        path: the file.
        what: what the file should be, for messages.
        vocab_size: pieces it must have, or None.
        add_space: whether a space is put before every text, as the file says; False: nowhere.
    """
    library = require_library("sentencepiece")
    path = require_file(path, what)
    contents = path.read_bytes()
    protos = require_library("sentencepiece.sentencepiece_model_pb2", "protobuf")
    try:
        if not add_space:
            # The only way to change it: the library has no such argument.
            proto = protos.ModelProto.FromString(contents)
            proto.normalizer_spec.add_dummy_prefix = False
            contents = proto.SerializeToString()
        processor = library.SentencePieceProcessor(model_proto=contents)
    except Exception as error:  # protobuf and the library raise kinds of their own
        raise DataError(f"{path} is no SentencePiece model; it should be {what}") from error
    require_size(path, processor.vocab_size(), vocab_size)
    return processor


def _special_ids(path: Path, processor: SentencePieceProcessor) -> tuple[int, int]:
    """Ids of the tokens that begin and end a sequence."""
    ids = processor.bos_id(), processor.eos_id()
    if min(ids) < 0:
        raise DataError(f"{path} has no tokens that begin and end a sequence (bos and eos)")
    return ids


def _decode(processor: SentencePieceProcessor, ids: Sequence[int] | np.ndarray) -> str:
    """Text of ids, control tokens and id 0 (unknown, padding) left out."""
    kept = [int(index) for index in ids]
    return processor.decode(
        [i for i in kept if not (processor.is_control(i) or processor.is_unknown(i))]
    )
