"""Captions of a row as token ids: which of them, the words around them, and their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from iv2_jax.data import captions, package_files, tokenizers
from iv2_jax.data.corpora import JoinedSource, min_words
from iv2_jax.data.modalities import CorpusConfig, TextConfig
from iv2_jax.data.records import Clip
from iv2_jax.data.sources import ClipSource
from iv2_jax.data.strings import Strings
from iv2_jax.data.tokenizers.base import Tokenizer


def load_tokenizer(config: TextConfig) -> Tokenizer:
    """The tokenizer of a config.

    Raises:
      ConfigError: an option is wrong, or its library is not installed.
      DataError: its file is missing or another model's.
    """
    path = package_files.resolve(config.path) if config.path else None
    return tokenizers.load(
        config.tokenizer, path, **{**config.options, "max_length": config.max_length}
    )


def usable_captions(texts: Iterable[str], least: int) -> list[str]:
    """Those that have at least so many words once cleaned."""
    return [t for t in texts if not least or len(captions.clean_text(t).split()) >= least]


class RowTexts:
    """Captions of the clips of a source as rows of token ids; picklable without the records.

    Attributes:
      pad_id: fills rows up, and those of clips without the caption.
      names: keys of the ids in a row, `text_<caption>`.
      max_length: ids of a row.
    """

    def __init__(self, source: ClipSource, config: TextConfig) -> None:
        """Takes the clips, whose captions are copied into arrays, and how to read them."""
        self._config = config
        self._tokenizer = load_tokenizer(config)
        self.pad_id = self._tokenizer.pad_id
        self.max_length = self._tokenizer.max_length
        self.names = {name: f"text_{name}" for name in config.captions}
        joined = isinstance(source, JoinedSource)
        self._corpora: tuple[CorpusConfig | None, ...] = source.corpora if joined else (None,)
        self._corpus = source.corpus if joined else np.zeros(len(source), np.int16)
        prompts = [
            config.prompt if c is None or c.prompt is None else c.prompt for c in self._corpora
        ]
        self._templates = [captions.templates(p) if p else ("{}",) for p in prompts]
        self._tables = {name: self._table(name, source.clips) for name in config.captions}

    def _table(self, name: str, clips: Sequence[Clip]) -> tuple[Strings, np.ndarray]:
        """All captions of a name one after the other, and where each clip's end."""
        least = [min_words(corpus, self._config) for corpus in self._corpora]
        inner = [name if c is None else c.captions.get(name, name) for c in self._corpora]
        found = [
            usable_captions(clip.captions.get(inner[at], ()), least[at])
            for clip, at in zip(clips, self._corpus.tolist(), strict=True)
        ]
        ends = np.cumsum([len(texts) for texts in found], dtype=np.int64)
        return Strings(text for texts in found for text in texts), ends

    def texts(self, name: str, index: int) -> list[str]:
        """The captions of a name that a clip has."""
        strings, ends = self._tables[name]
        return [strings[i] for i in range(int(ends[index - 1]) if index else 0, int(ends[index]))]

    def pick(self, index: int, rng: np.random.Generator | None) -> dict[str, str]:
        """The caption of each name that a row of this clip carries.

        Args:
          index: the clip.
          rng: source of the draws; None in evaluation, where the first of everything is taken.

        Returns:
          The texts by name, cleaned, in their prompts; names that the clip lacks are left out.
        """
        corpus = self._corpora[self._corpus[index]]
        choice = self._config.choice if corpus is None or corpus.choice is None else corpus.choice
        templates = self._templates[self._corpus[index]]
        picked = {}
        for name in self._config.captions:
            texts = self.texts(name, index)
            # Drawn whether there is a choice or not: what else is drawn must not depend on it.
            draws = (0.0, 0.0) if rng is None else rng.random(2)
            if texts:
                at = int(draws[0] * len(texts)) if choice == "random" else 0
                text = " ".join(texts) if choice == "join" else texts[at]
                template = templates[int(draws[1] * len(templates))]
                picked[name] = self.prepare(captions.format_prompt(template, text))
        return picked

    def prepare(self, text: str) -> str:
        """The text as it goes to the tokenizer."""
        if self._config.clean:
            return captions.clean_text(text, max_words=self._config.max_words)
        if self._config.max_words:
            return " ".join(text.split()[: self._config.max_words])
        return text

    def ids(self, texts: dict[str, str]) -> dict[str, np.ndarray]:
        """Token ids (L,) int32 of every name, padding for those without a text."""
        rows: dict[str, Any] = {}
        for name, key in self.names.items():
            if name in texts:
                rows[key] = self._tokenizer.encode_batch([texts[name]])[0][0]
            else:
                rows[key] = np.full(self.max_length, self.pad_id, np.int32)
        return rows
