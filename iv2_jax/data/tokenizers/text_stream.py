"""Text of tokens that come a few at a time, without broken letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iv2_jax.data.tokenizers.base import Tokenizer

_BROKEN = "\ufffd"  # what decoders write for bytes that are no letter (yet)


class TextStream:
    """Gives out text as far as later tokens cannot change it.

    A letter may be spread over several tokens, each a few of its bytes; it is held back until it
    is whole. All that `push` and `close` give, joined, is the tokenizer's `decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next tokens; gives the text that is now certain, maybe none."""
        self._ids += [int(index) for index in ids]
        return self._new(self._tokenizer.decode(self._ids).rstrip(_BROKEN))

    def close(self) -> str:
        """Gives the rest, with U+FFFD for bytes that never became a letter."""
        return self._new(self._tokenizer.decode(self._ids))

    def _new(self, text: str) -> str:
        """The part of the text that was not shown yet."""
        if not text.startswith(self._shown):  # wait: what was shown cannot be taken back
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new
