"""Settings of what a row has beside or instead of pictures: captions, sound, and its corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from iv2_jax.errors import ConfigError, nearest

if TYPE_CHECKING:
    from iv2_jax.data.data_config import DataConfig

MEDIA = ("video", "image", "audio", "audio_video", "text")
WITH_PICTURES = ("video", "image", "audio_video")
WITH_SOUND = ("audio", "audio_video")
_CHOICES = ("random", "first", "join")
_MATCHES = ("clip", "path")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Captions as token ids: adds `text_<caption>` int32 (b, L) for each of `captions`.

    Attributes:
      tokenizer: kind of tokenizer, see `data.tokenizers.KINDS`.
      path: its vocabulary; `package:NAME/FILE` names a file of an installed package.
      options: further arguments of the tokenizer.
      max_length: L, ids of a row.
      captions: names of the captions a row carries; a clip without one has padding everywhere.
      choice: which of several captions of one name: `random` in every row (in evaluation the
        first), `first`, or `join` for all of them, one after the other.
      clean: clean the text as the original does, see `captions.clean_text`.
      max_words: cut after so many words; 0 keeps all.
      prompt: text around every caption, with `{}` where it goes, or a set of such templates, of
        which each row draws one, see `captions.templates`.
      min_words: captions of fewer words are left out, and clips that have no other; 0 keeps all.
        The original leaves out captions of one word (`min_caption_length` 2).
    """

    tokenizer: str = "bert"
    path: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_length: int = 32
    captions: tuple[str, ...] = ("video",)
    choice: str = "random"
    clean: bool = True
    max_words: int = 0
    prompt: str = ""
    min_words: int = 0

    def __post_init__(self) -> None:
        from iv2_jax.data import tokenizers

        _check_known("text.tokenizer", self.tokenizer, tuple(tokenizers.KINDS))
        _check_known("text.choice", self.choice, _CHOICES)
        if not self.captions or len(set(self.captions)) < len(self.captions):
            raise ConfigError(f"text.captions {self.captions} must be different names, at least 1")
        if self.max_length < 1:
            raise ConfigError(f"text.max_length must be at least 1, is {self.max_length}")
        for name in ("max_words", "min_words"):
            if getattr(self, name) < 0:
                raise ConfigError(f"text.{name} must not be negative, is {getattr(self, name)}")
        check_prompt("text.prompt", self.prompt)


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """Sound as log-mel features: adds `fbank` float32 (b, frames, mels) and `has_audio` (b,).

    Attributes:
      num_mels: mel bins.
      seconds: length that every row's sound is brought to.
      crop: which stretch of longer sound: `random` in training (in evaluation the first), `first`
        or `center`.
      pad: how shorter sound is filled up: `waveform` with silence before the spectrum is taken,
        `features` with zeros after, `auto` as the original: sound files the first way, sound
        tracks of videos the second.
      missing: clips without sound: `mask` gives `has_audio` False, `zeros` lets features of zeros
        count as sound, as the released loader does.
      silent: sound tracks without any signal: `mask` as if there were none, or `keep`.
      released: decode as the released loaders do, see `audio.load_waveform`.
    """

    num_mels: int = 64
    seconds: float = 10.0
    crop: str = "random"
    pad: str = "auto"
    missing: str = "mask"
    silent: str = "mask"
    released: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("crop", ("random", "first", "center")),
            ("pad", ("auto", "waveform", "features")),
            ("missing", ("mask", "zeros")),
            ("silent", ("mask", "keep")),
        ):
            _check_known(f"audio.{name}", getattr(self, name), known)
        if self.num_mels < 1:
            raise ConfigError(f"audio.num_mels must be at least 1, is {self.num_mels}")
        if not self.seconds >= 0.025:
            raise ConfigError(f"audio.seconds must be at least 0.025, is {self.seconds}")


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """One of several lists that are loaded as one; what is None is taken from the data config.

    Attributes:
      source: manifest of any format, or folder of a packed data set.
      format: manifest format, see `manifest.FORMATS`.
      prefix: folder or URL that relative paths of the manifest are joined to.
      split: only the clips of this split.
      weight: how often an epoch shows each clip. A fraction shows some of them once more (or,
        below 1, at all), others in the next epoch.
      captions: name of a caption in the batch to its name in this list, e.g.
        {"video": "avs_captions"}.
      choice: as `text.choice`.
      prompt: as `text.prompt`.
      min_words: as `text.min_words`.
      seconds: only the first so many seconds of every clip (the original's `trimmed30`: 30).
      label: the first `video` caption is the name of a class, and kept as label `label` too.
    """

    source: str
    format: str = "auto"
    prefix: str = ""
    split: str | None = None
    weight: float = 1.0
    captions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choice: str | None = None
    prompt: str | None = None
    min_words: int | None = None
    seconds: float | None = None
    label: bool = False

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError("corpora[].source must be given: a manifest or a packed folder")
        if not 0 < self.weight < 1e6:
            raise ConfigError(f"{self.source}: corpora[].weight must be above 0, is {self.weight}")
        if self.choice is not None:
            _check_known("corpora[].choice", self.choice, _CHOICES)
        if self.prompt is not None:
            check_prompt("corpora[].prompt", self.prompt)
        if self.min_words is not None and self.min_words < 0:
            raise ConfigError(f"corpora[].min_words must not be negative, is {self.min_words}")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"corpora[].seconds must be above 0, is {self.seconds}")


def check_media(data: DataConfig) -> None:
    """Refuses fields of a `DataConfig` that say what a row has and do not fit each other."""
    media, text = data.media, data.text
    _check_known("data.media", media, MEDIA)
    _check_known("data.match", data.match, _MATCHES)
    if media in WITH_SOUND and data.audio is None:
        raise ConfigError(f"data.media={media!r} needs data.audio, e.g. an empty AudioConfig")
    if media not in WITH_SOUND and data.audio is not None:
        raise ConfigError(
            f"data.audio is set, but data.media={media!r} has no sound; use audio_video or audio"
        )
    if media == "text" and text is None:
        raise ConfigError("data.media='text' needs data.text")
    if media not in WITH_PICTURES and (data.mask != "none" or data.targets):
        raise ConfigError(f"data.media={media!r} has no pictures: leave out data.mask and targets")
    if data.source and data.corpora:
        raise ConfigError("data.source and data.corpora are both given: name each list once")
    names = set(text.captions) if text else set()
    for corpus in data.corpora:
        for name in set(corpus.captions) - names:
            raise ConfigError(
                f"{corpus.source}: corpora[].captions names {name!r}, which is not in "
                f"data.text.captions{nearest(name, names)}"
            )


def check_prompt(field: str, prompt: str) -> None:
    """Refuses a prompt that is no template; one in a file is read when the run starts."""
    from iv2_jax.data import captions

    if prompt and not prompt.startswith("file:"):
        try:
            captions.templates(prompt)
        except ConfigError as e:
            raise ConfigError(f"{field}: {e}") from None


def _check_known(field: str, value: str, known: tuple[str, ...]) -> None:
    """Refuses a value that is not one of `known`."""
    if value not in known:
        raise ConfigError(f"{field} {value!r} is not known{nearest(value, known)}")
