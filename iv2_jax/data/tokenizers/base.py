"""What every tokenizer does alike: framing, truncation, padding and the check of its input."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np

from iv2_jax.errors import ConfigError, DataError

Side = Literal["right", "left"]


class Tokenizer(abc.ABC):
    """Turns texts into rows of token ids of one length.

    A row is `before`, the ids of the text, `after`, and padding. A text that is too long loses
    ids at the side where padding would be; `before` and `after` always stay.

    Attributes:
        max_length: ids of a row.
        vocab_size: number of ids; all are below it.
        pad_id: fills rows up.
        before: ids put before every text.
        after: ids put after every text.
        side: where rows are padded and texts cut.

    Raises:
        ConfigError: an option is out of range.
    """

    def __init__(
        self,
        *,
        max_length: int,
        vocab_size: int,
        pad_id: int,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        side: Side = "right",
    ) -> None:
        framing = len(before) + len(after)
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length <= framing:
            raise ConfigError(
                f"max_length={max_length!r}: must be a whole number above {framing}, the number "
                "of special tokens around every text"
            )
        if side not in ("right", "left"):
            raise ConfigError(f"side={side!r}: must be 'right' or 'left'")
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.before = tuple(before)
        self.after = tuple(after)
        self.side = side

    @abc.abstractmethod
    def _ids(self, text: str) -> list[int]:
        """Ids of a checked text, nothing around them."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Gives the text of ids `(L,)`, special tokens and padding left out."""

    def tokenize(self, text: str) -> list[int]:
        """Gives the ids of a text, whole and with nothing around them.

        Raises:
            DataError: `text` is not a string.
        """
        return self._ids(_checked(text))

    def encode(self, text: str) -> list[int]:
        """Gives the ids of a text with its special tokens, cut to `max_length`, without padding.

        Raises:
            DataError: `text` is not a string.
        """
        ids = self.tokenize(text)
        room = self.max_length - len(self.before) - len(self.after)
        if len(ids) > room:
            ids = ids[:room] if self.side == "right" else ids[len(ids) - room :]
        return [*self.before, *ids, *self.after]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes texts.

        Args:
            texts: B strings; an empty one gives a row of special tokens and padding.

        Returns:
            Ids, int32 `(B, max_length)`, and the mask, int32 `(B, max_length)`: 1 = token,
            0 = padding.

        Raises:
            DataError: `texts` is one string, or one of them is not a string; names its number.
        """
        if isinstance(texts, str | bytes):
            raise DataError(f"texts must be a list of strings, not the one string {texts[:40]!r}")
        ids = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            try:
                encoded = self.encode(text)
            except DataError as error:
                raise DataError(f"text {row}: {error}") from None
            start = 0 if self.side == "right" else self.max_length - len(encoded)
            ids[row, start : start + len(encoded)] = encoded
            mask[row, start : start + len(encoded)] = 1
        return ids, mask


def _checked(text: str) -> str:
    """Refuses what is no string, and drops halves of surrogate pairs, which no encoder takes."""
    if not isinstance(text, str):
        shown = f"{text!r:.40}" if isinstance(text, bytes | int | float) else ""
        raise DataError(f"a text must be a string, not {type(text).__name__} {shown}".rstrip())
    return text.encode("utf-8", "ignore").decode("utf-8")


def require_file(path: str | Path | None, what: str) -> Path:
    """Gives the path of a vocabulary file.

    Raises:
        DataError: none is given, or it is not there.
    """
    if path is None:
        raise DataError(f"give the path of {what}")
    path = Path(path)
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise DataError(f"{path} {kind}; it should be {what}")
    return path


def require_size(path: Path, found: int, wanted: int | None) -> None:
    """Raises DataError if a vocabulary is not as large as the model's table; None accepts all."""
    if wanted is not None and found != wanted:
        raise DataError(
            f"{path} has {found} tokens and the model's table {wanted}: it belongs to another model"
        )


def require_library(name: str, package: str | None = None) -> ModuleType:
    """Imports a library of the extra `text`.

    Raises:
        ConfigError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this tokenizer needs the package {package or name}: pip install 'iv2_jax[text]'"
        ) from error
