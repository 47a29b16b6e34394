"""Several lists as one: concatenated, each with its weight, filter and captions (spec stage2 8.4).

Clips are numbered through all lists; captions of too few words, and clips with no other, are left
out before that.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.modalities import CorpusConfig, TextConfig
from iv2_jax.data.records import Clip
from iv2_jax.data.sources import (
    ClipSource,
    FileSource,
    Frames,
    PackedSource,
    Sound,
    open_source,
)
from iv2_jax.errors import ConfigError, DataError


class JoinedSource:
    """Clips of several lists, one list after the other; a `ClipSource`.

    Attributes:
      clips: the records.
      corpora: settings of the lists.
      corpus: (n,) int16, which list each clip is of.
    """

    def __init__(
        self,
        sources: Sequence[ClipSource],
        corpora: Sequence[CorpusConfig],
        kept: Sequence[np.ndarray],
        clips: Sequence[Clip],
    ) -> None:
        """Takes the lists, their settings, which of their clips count, and these clips."""
        self.clips = clips
        self.corpora = tuple(corpora)
        self.corpus = np.repeat(np.arange(len(kept), dtype=np.int16), [len(k) for k in kept])
        self._sources = tuple(sources)
        self._position = np.concatenate(kept).astype(np.int64)

    def __len__(self) -> int:
        return len(self._position)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "clips": ()}

    def _at(self, index: int) -> tuple[ClipSource, int]:
        """The list of a clip, and its place there."""
        return self._sources[self.corpus[index]], int(self._position[index])

    def name(self, index: int) -> str:
        """What messages call the clip."""
        source, at = self._at(index)
        return source.name(at)

    def open(self, index: int) -> Frames:
        """Opens the clip."""
        source, at = self._at(index)
        return source.open(at)

    def sound(self, index: int) -> Sound:
        """Where the clip's sound is."""
        source, at = self._at(index)
        return source.sound(at)


def open_data(config: DataConfig) -> ClipSource:
    """Opens the list or lists of a data config.

    Raises:
      ConfigError: the config names none, or both kinds.
      DataError: one cannot be read or is empty, or no clip is left.
    """
    if not config.corpora and not (config.text and config.text.min_words):
        if not config.source:
            raise ConfigError("data.source must be given: a manifest or a packed folder")
        return open_source(
            config.source,
            format=config.format,
            prefix=config.prefix,
            split=config.split,
            separator=config.separator,
        )
    corpora = config.corpora or (
        CorpusConfig(config.source, config.format, config.prefix, config.split),
    )
    sources, kept, clips = [], [], []
    for corpus in corpora:
        source = _open_corpus(corpus, config)
        records = [_with_label(clip) for clip in source.clips] if corpus.label else source.clips
        keep = _long_enough(records, corpus, config)
        sources.append(source)
        kept.append(keep)
        clips += [records[i] for i in keep]
        if len(source) > len(keep):
            print(
                f"iv2: {corpus.source}: {len(source) - len(keep)} of {len(source)} clips left out: "
                f"their captions have fewer than {min_words(corpus, config.text)} words",
                file=sys.stderr,
                flush=True,
            )
    if not clips:
        raise DataError(
            f"{', '.join(c.source for c in corpora)}: no clip has a caption of "
            "data.text.min_words words; lower it, or check data.text.captions"
        )
    return JoinedSource(sources, corpora, kept, clips)


def _open_corpus(corpus: CorpusConfig, config: DataConfig) -> ClipSource:
    """One list, its clips cut to their first seconds if that is asked for."""
    split = corpus.split if corpus.split is not None else config.split
    options = {
        "format": corpus.format,
        "prefix": corpus.prefix or config.prefix,
        "separator": config.separator,
    }
    source = open_source(corpus.source, split=split, **options)
    if corpus.seconds is None:
        return source
    if isinstance(source, PackedSource):
        return PackedSource(corpus.source, split=split, seconds=corpus.seconds)
    return FileSource([_first_seconds(clip, corpus.seconds) for clip in source.clips])


def _first_seconds(clip: Clip, seconds: float) -> Clip:
    """The clip, cut after its first seconds."""
    end = (clip.start or 0.0) + seconds
    return dataclasses.replace(clip, end=end if clip.end is None else min(end, clip.end))


def _with_label(clip: Clip) -> Clip:
    """The clip with its caption as a label."""
    name = next(iter(clip.captions.get("video", ())), None)
    if name is None:
        raise DataError(f"clip {clip.id!r} has no caption, which corpora[].label makes its label")
    return dataclasses.replace(clip, labels={**clip.labels, "label": name})


def min_words(corpus: CorpusConfig | None, text: TextConfig | None) -> int:
    """Words that a caption of a list must have."""
    if corpus is not None and corpus.min_words is not None:
        return corpus.min_words
    return text.min_words if text is not None else 0


def _long_enough(clips: Sequence[Clip], corpus: CorpusConfig, config: DataConfig) -> np.ndarray:
    """Places of the clips that have a caption of enough words."""
    from iv2_jax.data.row_texts import usable_captions

    text, least = config.text, min_words(corpus, config.text)
    if text is None or not least:
        return np.arange(len(clips))
    names = [corpus.captions.get(name, name) for name in text.captions]
    kept = [
        i
        for i, clip in enumerate(clips)
        if any(usable_captions(clip.captions.get(name, ()), least) for name in names)
    ]
    return np.array(kept, np.int64)


class Spread:
    """How often an epoch shows each clip: weights of the lists as places in a longer list.

    A list of n clips with weight w takes int(n * w) places, place i shows clip i // w: copies are
    neighbours before the shuffle, as in the original (which knows whole weights only). For other
    weights the rounding moves on from epoch to epoch, so that every clip gets its turn.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]) -> None:
        """Takes the lists' sizes and weights."""
        places = [
            max(math.floor(n * w + 1e-9), 1) if n else 0
            for n, w in zip(sizes, weights, strict=True)
        ]
        self._sizes, self._weights = tuple(sizes), tuple(weights)
        self._ends = np.cumsum(places, dtype=np.int64)
        self._first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __len__(self) -> int:
        """Places of an epoch."""
        return int(self._ends[-1])

    def clip(self, place: int, epoch: int) -> int:
        """Clip that a place shows in an epoch."""
        corpus = int(np.searchsorted(self._ends, place, side="right"))
        place -= int(self._ends[corpus - 1]) if corpus else 0
        weight, size = self._weights[corpus], self._sizes[corpus]
        phase = math.modf(epoch * weight + 1e-9)[0] if weight % 1 else 0.0
        return int(self._first[corpus]) + min(int((place + phase) / weight + 1e-9), size - 1)


def spread_of(source: ClipSource) -> Spread | None:
    """The weights of a source's lists; None where every clip is shown once."""
    if not isinstance(source, JoinedSource) or all(c.weight == 1 for c in source.corpora):
        return None
    sizes = np.bincount(source.corpus, minlength=len(source.corpora)).tolist()
    return Spread(sizes, [c.weight for c in source.corpora])


def match_ids(source: ClipSource, config: DataConfig) -> np.ndarray:
    """(n,) int32: clips with equal numbers are positives of each other.

    Raises:
      ConfigError: `released_match_ids` with `match` by path.
    """
    if config.match == "path":
        if config.released_match_ids:
            raise ConfigError("data.released_match_ids goes with data.match='clip'")
        numbers: dict[str, int] = {}
        paths = (clip.path or clip.id for clip in source.clips)
        return np.array([numbers.setdefault(p, len(numbers)) for p in paths], np.int32)
    if config.released_match_ids and isinstance(source, JoinedSource):
        sizes = np.bincount(source.corpus, minlength=len(source.corpora))
        return np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
    return np.arange(len(source), dtype=np.int32)
