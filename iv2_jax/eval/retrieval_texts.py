"""The captions of a set as queries, and which clip each is right for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iv2_jax.data.captions import clean_text
from iv2_jax.data.corpora import JoinedSource
from iv2_jax.data.modalities import TextConfig
from iv2_jax.data.row_texts import RowTexts
from iv2_jax.data.sources import ClipSource
from iv2_jax.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class TextSet:
    """Texts and their ground truth.

    Attributes:
      texts: T cleaned texts.
      relevant: bool (V, T), which text is right for which clip.
      counts: int (T,), captions of that text: how often it counts as a query.
    """

    texts: tuple[str, ...]
    relevant: np.ndarray
    counts: np.ndarray


def clip_texts(source: ClipSource, caption: str, config: TextConfig) -> list[tuple[str, ...]]:
    """The cleaned texts of each clip; an empty tuple where it has none that is left.

    Several captions of a clip are several texts (MSVD, VATEX); with `choice='join'` they are one
    paragraph (ActivityNet, DiDeMo), with `choice='first'` the others are left out.

    Args:
      source: V clips, of one list or several.
      caption: Name of the caption.
      config: How texts are chosen, cleaned and cut; lists may have choices of their own.

    Raises:
      DataError: No clip has a caption of that name.
    """
    rows = RowTexts(source, config)
    captions = [rows.texts(caption, i) for i in range(len(source))]
    if not any(captions):
        known = {name for clip in source.clips for name in clip.captions}
        raise DataError(f"no clip has a caption {caption!r}{nearest(caption, known)}")
    choices = [config.choice] * len(captions)
    if isinstance(source, JoinedSource):
        own = [corpus.choice or config.choice for corpus in source.corpora]
        choices = [own[corpus] for corpus in source.corpus]
    return [_chosen(texts, choice, config) for texts, choice in zip(captions, choices, strict=True)]


def _chosen(captions: Sequence[str], choice: str, config: TextConfig) -> tuple[str, ...]:
    """One clip's captions as texts."""
    if choice == "join":
        captions = [" ".join(captions)]
    elif choice == "first":
        captions = captions[:1]
    cleaned = (clean(text, config) for text in captions)
    return tuple(text for text in cleaned if text)


def clean(text: str, config: TextConfig) -> str:
    """A text as the towers get it, before the tokenizer."""
    if config.clean:
        return clean_text(text, max_words=config.max_words)
    return " ".join(text.split()[: config.max_words]) if config.max_words else text.strip()


def text_set(texts: Sequence[Sequence[str]], *, same_text_relevant: bool = True) -> TextSet:
    """Lays the texts of clips out as queries.

    Args:
      texts: Of each of V clips, at least one.
      same_text_relevant: Texts that are equal are one text, which is right for every clip that
        has it and counts as a query once for each caption. False is the original: each caption is
        right for its own clip alone, and its copies are wrong.
    """
    if not all(texts):
        raise ValueError("every clip needs a text")
    place: dict[str, int] = {}
    columns: list[str] = []
    pairs = []
    for clip, own in enumerate(texts):
        for text in own:
            if not same_text_relevant or text not in place:
                place[text] = len(columns)
                columns.append(text)
            pairs.append((clip, place[text]))
    rows, chosen = np.array(pairs).T
    relevant = np.zeros((len(texts), len(columns)), bool)
    relevant[rows, chosen] = True
    return TextSet(tuple(columns), relevant, np.bincount(chosen, minlength=len(columns)))


def choose_caption(config: TextConfig, caption: str) -> str:
    """The caption to ask with: the one named, else the first that the rows carry."""
    if caption and caption not in config.captions:
        hint = nearest(caption, config.captions)
        raise ConfigError(f"caption {caption!r} is not among data.text.captions{hint}")
    return caption or config.captions[0]
