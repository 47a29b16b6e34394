"""Settings of the loader."""

from __future__ import annotations

import dataclasses

from iv2_jax.data import modalities, sampling
from iv2_jax.data.modalities import AudioConfig, CorpusConfig, TextConfig
from iv2_jax.data.rand_augment import RandAugmentConfig
from iv2_jax.errors import ConfigError, nearest

_AUGMENTS = ("multiscale_crop", "random_resized_crop", "finetune_crop", "center", "stretch")
_EVAL_AUGMENTS = ("center", "stretch")  # the same picture every time
_MASKS = ("none", "tube", "random")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to load and how.

    Attributes:
      source: manifest of any format, or folder of a packed data set; empty with `corpora`.
      format: manifest format, see `manifest.FORMATS`.
      prefix: folder or URL that relative paths of the manifest are joined to.
      separator: column separator of text lists; None tries space, comma and tab.
      split: only the clips of this split.
      media: what rows are made of: `video`, `image` (T is 1), `audio`, `audio_video` or `text`.
      text: adds captions; None leaves them out.
      audio: how sound is read, with `audio` and `audio_video`.
      corpora: several lists one after the other, each with settings of its own.
      match: which rows are positives of each other: those of one `clip`, or of one file (`path`).
      released_match_ids: ids count from 0 in every corpus, so that clips of different corpora
        match by accident, as released (spec stage2 11.14).
      num_frames: T, frames of a view.
      sampling: rule that picks them, see `sampling.rule`.
      stride: distance of the frames for the rule `dense`.
      released_minus_one: the released pretraining loader's frames, each one too early.
      released_sampling: `rand`, `middle` and `dense` with the released code's faults.
      size: S, side of the pictures.
      short_side: evaluation: short side before the centre crop; None = `size`.
      augment: of training `multiscale_crop` (stage 1), `random_resized_crop` (stage 2, bicubic) or
        `finetune_crop` (fine-tuning, bilinear without antialiasing); always the same picture:
        `center`, or `stretch`, which keeps no aspect ratio.
      rand_augment: changes of colour and shape before the crop, in training; None for none.
      crop_area: smallest and largest share of the picture that the random crops take.
      antialias: both stage-2 resizes average where they make smaller; off as torchvision 0.14,
        which the released models were trained with (spec stage2 11.8).
      flip: mirror half of the training clips.
      released_flip: mirror clips whose caption says left or right, too.
      views: temporal views of a clip; in training, independent draws.
      shared_frames: training: all views show the same frames, decoded once, and differ in their
        crops and changes only (repeated augmentation).
      crops: evaluation: crops along the longer side for each temporal view.
      mask: `none`, `tube` or `random`: adds `visible`.
      mask_ratio: share of tokens hidden.
      mask_grid: (T', H', W') of the tokens.
      shuffle: a new order every epoch.
      fixed_view: training: every clip always in its evaluation view, so that what was computed of
        it once stays true.
      keep_gb: memory for pictures and sound of a `fixed_view` or of `keep_views`, so that they are
        decoded once, in each worker process; what does not fit is decoded every time. Sound must
        be cropped the same way every time, too.
      keep_views: training: the random views that a clip has in all, of which each visit shows one;
        0 draws a new one every time.
      targets: folder of arrays stored by clip, see `data.targets`.
      eval: one pass in the list's order, deterministic views, last batch padded.
      num_workers: worker processes; 0 decodes in threads of this process.
      threads: those threads; 0 decodes in the caller's thread.
      prefetch: batches kept ready (by each worker).
      max_bad_share: share of rows that may be replaced before a `DataError`.
      max_tries: undecodable clips in a row before a `DataError`.
      bad_clip_log: JSONL file on a local disk that names bad clips; empty = stderr only. With
        several processes their number goes before the extension.
    """

    source: str = ""
    format: str = "auto"
    prefix: str = ""
    separator: str | None = None
    split: str | None = None
    media: str = "video"
    text: TextConfig | None = None
    audio: AudioConfig | None = None
    corpora: tuple[CorpusConfig, ...] = ()
    match: str = "clip"
    released_match_ids: bool = False
    num_frames: int = 16
    sampling: str = "pretrain"
    stride: int = 4
    released_minus_one: bool = False
    released_sampling: bool = False
    size: int = 224
    short_side: int | None = None
    augment: str = "multiscale_crop"
    rand_augment: RandAugmentConfig | None = None
    crop_area: tuple[float, float] = (0.5, 1.0)
    antialias: bool = True
    flip: bool = True
    released_flip: bool = False
    views: int = 1
    shared_frames: bool = False
    crops: int = 1
    mask: str = "none"
    mask_ratio: float = 0.8
    mask_grid: tuple[int, int, int] | None = None
    shuffle: bool = True
    fixed_view: bool = False
    keep_gb: float = 0.0
    keep_views: int = 0
    targets: str = ""
    eval: bool = False
    num_workers: int = 0
    threads: int = 2
    prefetch: int = 2
    max_bad_share: float = 0.1
    max_tries: int = 16
    bad_clip_log: str = ""

    def __post_init__(self) -> None:
        for name in ("num_frames", "stride", "size", "views", "crops", "prefetch", "max_tries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, is {getattr(self, name)}")
        for name in ("num_workers", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name} must not be negative, is {getattr(self, name)}")
        for name, known in (("augment", _AUGMENTS), ("mask", _MASKS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"data.{name} {value!r} is not known{nearest(value, known)}")
        for name in ("max_bad_share", "mask_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} must be from 0 to 1, is {getattr(self, name)}")
        modalities.check_media(self)
        sampling.rule(self.sampling)
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ConfigError(f"data.crop_area must be two shares from 0 to 1, is {self.crop_area}")
        if self.mask != "none" and self.mask_grid is None:
            raise ConfigError(f"data.mask {self.mask!r} needs data.mask_grid=(T', H', W')")
        fixed = self.augment in _EVAL_AUGMENTS
        if self.eval and not fixed:
            raise ConfigError(
                f"data.eval needs data.augment='center' or 'stretch', is {self.augment!r}"
            )
        short_side = self.size if self.short_side is None else self.short_side
        if self.fixed_view and (not fixed or self.views > 1):
            raise ConfigError(
                "data.fixed_view needs data.augment='center' or 'stretch', and data.views=1"
            )
        if not self.keep_gb >= 0:
            raise ConfigError(f"data.keep_gb must be at least 0, is {self.keep_gb}")
        if self.keep_gb and not (self.fixed_view or self.keep_views):
            raise ConfigError(
                "data.keep_gb needs data.fixed_view or data.keep_views: other views differ every "
                "time"
            )
        if self.keep_views < 0:
            raise ConfigError(f"data.keep_views must be at least 0, is {self.keep_views}")
        if self.keep_views and (self.fixed_view or self.eval or self.flip):
            # Whether a clip may be mirrored depends on the caption of the visit.
            raise ConfigError("data.keep_views needs data.fixed_view, eval and flip to be False")
        if self.keep_gb and self.audio is not None and self.audio.crop == "random":
            raise ConfigError("data.keep_gb needs data.audio.crop='first' or 'center'")
        if self.targets and not (self.fixed_view or self.eval):
            raise ConfigError("data.targets needs data.fixed_view: they were made of one view")
        if self.crops > 1 and (self.augment != "center" or short_side != self.size):
            raise ConfigError("data.crops > 1 needs data.augment='center' and no data.short_side")
        if short_side < self.size:
            raise ConfigError(
                f"data.short_side {short_side} must be at least data.size {self.size}"
            )

    @property
    def frames(self) -> int:
        """T, frames of a view: 1 for pictures."""
        return 1 if self.media == "image" else self.num_frames

    @property
    def num_views(self) -> int:
        """V: temporal views times crops."""
        return self.views * self.crops
