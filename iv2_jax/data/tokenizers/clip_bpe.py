"""CLIP's byte-level BPE tokenizer, for the MobileCLIP text tower (spec stage2 7.3)."""

from __future__ import annotations

import gzip
import html
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.data.tokenizers.base import Tokenizer, require_file, require_library
from iv2_jax.errors import DataError

CLIP_VOCAB_SIZE = 49408
MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_WORD_END = "</w>"
# English endings, runs of letters, single digits, runs of anything else but spaces.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer(Tokenizer):
    """Text mended, in lower case and single-spaced, then byte-pair encoding.

    A row is start, pieces, end and zeros; a text that is too long still ends with the end token,
    whose id is the largest, which is how the tower finds the place of its feature. The original
    takes a literal `<end_of_text>` in a caption for that token; here it is text like any other.

    Attributes:
        start_id: begins every row.
        end_id: ends every row.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        max_length: int = 77,
        vocab_size: int = CLIP_VOCAB_SIZE,
    ) -> None:
        """Reads the merges.

        Args:
            path: `bpe_simple_vocab_16e6.txt.gz` (or unpacked), one merge a line after a title
                line; None takes the one in the package open_clip_torch.
            max_length: ids of a row, start and end included.
            vocab_size: tokens of the vocabulary: 512 byte tokens, start, end, and the first
                merges of the file, which has many more than are used.

        Raises:
            DataError: the file is missing, or is not a list of merges, or is too short.
            ConfigError: the libraries `tokenizers` and `ftfy` are not installed, or an option is
                wrong.
        """
        library = require_library("tokenizers")
        self._mend = require_library("ftfy").fix_text
        path = _packaged_merges() if path is None else path
        merges = _read_merges(require_file(path, f"CLIP's {MERGES_FILE}"), vocab_size - 514)
        letters = list(_byte_letters().values())
        tokens = [*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges)]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        try:
            model = library.models.BPE(
                vocab=vocabulary, merges=merges, end_of_word_suffix=_WORD_END
            )
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path}: the merges do not build on each other: {error}") from error
        self._tokenizer = library.Tokenizer(model)
        split = library.pre_tokenizers.Split(library.Regex(_WORDS), "removed", invert=True)
        to_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([split, to_bytes])
        self._tokenizer.decoder = library.decoders.ByteLevel()
        # Unknown to the library: nothing that is written in a text can end it early.
        self.start_id, self.end_id = vocab_size - 2, vocab_size - 1
        super().__init__(
            max_length=max_length,
            vocab_size=vocab_size,
            pad_id=0,
            before=[self.start_id],
            after=[self.end_id],
        )

    def _ids(self, text: str) -> list[int]:
        """Byte-pair ids."""
        # The order is the original's: mending undoes broken encodings and curly quotes, and HTML
        # entities are often escaped twice.
        text = html.unescape(html.unescape(self._mend(text)))
        text = " ".join(text.split()).lower()
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Gives the text of ids `(L,)`, up to the first end token; words are set apart."""
        kept: list[int] = []
        for index in map(int, ids):
            if index == self.end_id:
                break
            if index != self.start_id:
                kept.append(index)
        return self._tokenizer.decode(kept).replace(_WORD_END, " ").strip()

    def __getstate__(self) -> dict[str, Any]:
        """The state without the library's function, which workers import themselves."""
        return {name: value for name, value in vars(self).items() if name != "_mend"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _mend=require_library("ftfy").fix_text)


def _packaged_merges() -> Path:
    """Where open_clip_torch keeps the merges; the package itself is not imported."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"give the path of CLIP's {MERGES_FILE}, or install the package that carries it: "
            "pip install open_clip_torch"
        )
    return Path(spec.submodule_search_locations[0]) / MERGES_FILE


def _read_merges(path: Path, count: int) -> list[tuple[str, str]]:
    """The first `count` merges of a file."""
    try:
        contents = path.read_bytes()
        if contents[:2] == b"\x1f\x8b":
            contents = gzip.decompress(contents)
        lines = contents.decode("utf-8").split("\n")[1:]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list of merges: {error}") from None
    merges = [tuple(line.split()) for line in lines[:count]]
    wrong = next((i for i, merge in enumerate(merges) if len(merge) != 2), None)
    if wrong is not None and any(merges[wrong:]):
        raise DataError(
            f"{path}, line {wrong + 2}: a merge is two pieces with a space between, not "
            f"{lines[wrong][:60]!r}; this is not CLIP's {MERGES_FILE}"
        )
    if wrong is not None or len(merges) < count:
        found = len(merges) if wrong is None else wrong
        raise DataError(f"{path} has {found} merges and the model needs {count}: it is cut off")
    return merges


def _byte_letters() -> dict[int, str]:
    """Byte -> printable letter that stands for it in the vocabulary, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    letters = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}
