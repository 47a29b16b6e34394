"""SentencePiece models made from lists of pieces, as GGUF and llama2.c files have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from iv2_jax.data.tokenizers.base import require_library
from iv2_jax.errors import DataError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Types of pieces; the numbers are SentencePiece's and GGUF's alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def make_processor(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], source: str
) -> SentencePieceProcessor:
    """Makes a BPE model; unknown letters are spelt in bytes, and no space is put before a text.

    User-defined pieces are made control pieces: SentencePiece would find them in any text.

    Args:
        pieces: their texts, a space written as U+2581.
        scores: the higher, the earlier two pieces are joined to this one.
        types: NORMAL to BYTE.
        source: what messages call the list.

    Raises:
        DataError: the list is no vocabulary.
        ConfigError: the library is not installed.
    """
    library = require_library("sentencepiece")
    messages = require_library("sentencepiece.sentencepiece_model_pb2", "sentencepiece")
    if not len(pieces) == len(scores) == len(types):
        raise DataError(
            f"{source} has {len(pieces)} tokens, {len(scores)} scores and {len(types)} types"
        )
    model = messages.ModelProto()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        kind = CONTROL if kind == USER_DEFINED else kind
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = messages.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = BYTE in types
    model.trainer_spec.vocab_size = len(pieces)
    unknown = [index for index, kind in enumerate(types) if kind == UNKNOWN]
    model.trainer_spec.unk_id = unknown[0] if unknown else 0
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    try:
        return library.SentencePieceProcessor(model_proto=model.SerializeToString())
    except Exception as error:  # the library raises kinds of its own
        raise DataError(f"{source} is no vocabulary of pieces: {error}") from error
