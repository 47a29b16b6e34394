"""What language models' tokenizers share: marks of the template against text that users type.

A chat is written with special tokens (`[INST]`, `<|im_end|>`, `</s>`) between what people say. In
the template's own text they become one id each; in what a user typed the same letters are letters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from iv2_jax.data.tokenizers.base import Tokenizer, _checked


class LlmTokenizer(Tokenizer):
    """A language model's tokenizer.

    `tokenize` and `encode` are for text of templates: special tokens written in it become one id
    each. `tokenize_plain` is for text of users, `tokenize_parts` for a mix of both.

    Attributes:
        specials: `{special token: id}`.
        bos_id: begins a sequence.
        eos_id: ends an answer.
    """

    specials: dict[str, int]
    bos_id: int
    eos_id: int

    def tokenize_plain(self, text: str) -> list[int]:
        """Gives the ids of a user's text; no special token is among them.

        Raises:
            DataError: `text` is not a string.
        """
        return self.tokenize_parts([(text, True)])

    def tokenize_parts(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Gives the ids of texts in a row, some of which a user typed.

        They are tokenized as one text, so the ids are those of `tokenize` of all of it as long as
        no special token touches a user's text. One that does is cut in two behind its first letter
        and the text is tokenized around the cut: the same letters, and never the special token.

        Args:
            parts: texts, each with True if a user typed it.

        Raises:
            DataError: a text is not a string.
        """
        text, typed = "", []
        for part, is_user in parts:
            start = len(text)
            text += _checked(part)
            if is_user:
                typed.append((start, len(text)))
        cuts = sorted(self._cuts(text, typed))
        if not cuts:
            return self._ids(text)
        ids = self._ids(text[: cuts[0]])
        for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
            ids += self._continued(text[start:end])
        return ids

    def _cuts(self, text: str, typed: Sequence[tuple[int, int]]) -> set[int]:
        """Where to cut so that no special token touches the typed spans."""
        cuts = set()
        for name in self.specials:
            if name not in text:  # most are not, and there may be hundreds
                continue
            # A look-ahead finds those too that overlap each other.
            for match in re.finditer(f"(?={re.escape(name)})", text):
                start, end = match.start(), match.start() + len(name)
                if len(name) > 1 and any(start < b and a < end for a, b in typed):
                    cuts.add(start + 1)
        return cuts

    def _continued(self, text: str) -> list[int]:
        """Ids of a text that stands behind another: no space is put before it."""
        anchor, index = next(iter(self.specials.items()))
        ids = self._ids(anchor + text)
        return ids[1:] if ids[:1] == [index] else self._ids(text)
