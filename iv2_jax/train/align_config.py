"""The config of a stage-2 run, and its cross checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from iv2_jax.data.data_config import DataConfig
from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models.stage2 import Stage2Config
from iv2_jax.objectives.alignment_terms import MEDIA_TERMS, TERMS
from iv2_jax.train.distill import TeacherConfig
from iv2_jax.train.pairs import PairConfig

if TYPE_CHECKING:
    from iv2_jax.train.align import AlignStage


class Towers(NamedTuple):
    """Which towers drop paths and values in a step; frozen ones do not unless asked to."""

    vision: bool
    text: bool
    audio: bool
    fusion: bool


@dataclass(frozen=True)
class VisionMask:
    """Which patches the vision tower sees in training (spec stage2 6.5).

    Attributes:
        kind: `random` hides patches of the whole clip, `tube` the same ones in every frame,
            `attention` draws the visible ones of each frame by the teacher's saliency, `none`
            shows all.
        ratio: share hidden.
    """

    kind: Literal["random", "tube", "attention", "none"] = "random"
    ratio: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise ConfigError(f"mask ratio must be in [0, 1), not {self.ratio}")


@dataclass(frozen=True)
class WordMask:
    """Hiding of words for masked language modelling (spec stage2 6.3); ids are BERT's.

    Attributes:
        probability: of hiding a word.
        mask_id: the mask token.
        pad_id: the padding token.
        special_ids: tokens that are never hidden: padding, class token, end of text.
        logits_share: share of a batch's places that words are guessed for at once; a step that
            hides more (never, with captions shorter than the text length) computes all places.
    """

    probability: float = 0.5
    mask_id: int = 103
    pad_id: int = 0
    special_ids: tuple[int, ...] = (0, 101, 102)
    logits_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("probability", "logits_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"loss.words.{name} must be in (0, 1], not {getattr(self, name)}")

    def capacity(self, places: int) -> int:
        """Places that words are guessed for at once."""
        return max(1, round(places * self.logits_share))


@dataclass(frozen=True)
class AlignLossConfig:
    """Which terms a batch runs, how much they weigh and how they are computed.

    Attributes:
        weights: term -> weight; terms that are not named weigh nothing and are not computed.
        captions: term -> name of the caption it uses.
        default_caption: the caption of terms that `captions` does not name.
        media: media type -> the terms it runs, of those that weigh something (spec 6.6).
        contrastive: `softmax`, or the pairwise `sigmoid` with a learned bias.
        form: how the global contrast is computed: `dense`, `chunked` or `ring`; the same numbers
            with less memory and more code. Ring pays from about 16k rows on.
        feature_gradient: factor of the contrastive gradient through the features. The released
            code has 1 / devices (1/64 for 1B, 1/256 for 6B, trap 11.4); 1 is the true gradient.
        group_size: rows among which hard negatives are found; the original's are its 64 rows a
            device. 0 takes the whole batch.
        hard_negatives: find negatives by similarity, else by chance.
        words: hiding of words.
        released_audio_mlm: in audio batches run `amlm` only where `mlm` weighs something
            (trap 11.21); it is reported as `amlm` in any case.
        teacher_ratios: weights of the tokens' and of the final feature's part of `uta`.
        teacher_on_images_only: the `uta` term leaves videos out.
    """

    weights: dict[str, float] = field(default_factory=lambda: {"vtc": 1.0, "vtm": 1.0, "mlm": 1.0})
    captions: dict[str, str] = field(default_factory=dict)
    default_caption: str = "video"
    media: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(MEDIA_TERMS))
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    form: Literal["dense", "chunked", "ring"] = "dense"
    feature_gradient: float = 1.0
    group_size: int = 64
    hard_negatives: bool = True
    words: WordMask = field(default_factory=WordMask)
    released_audio_mlm: bool = False
    teacher_ratios: tuple[float, float] = (1.0, 1.0)
    teacher_on_images_only: bool = False

    def __post_init__(self) -> None:
        named = {
            "weights": self.weights,
            "captions": self.captions,
            **{f"media.{kind}": dict.fromkeys(terms) for kind, terms in self.media.items()},
        }
        for where, terms in named.items():
            for term in terms:
                if term not in TERMS:
                    raise ConfigError(f"loss.{where}: no term {term!r}{nearest(term, TERMS)}")
        for kind in self.media:
            if kind not in MEDIA_TERMS:
                raise ConfigError(f"loss.media: no media {kind!r}{nearest(kind, MEDIA_TERMS)}")
        for term, weight in self.weights.items():
            if weight < 0:
                raise ConfigError(f"loss.weights.{term} must be >= 0, not {weight}")
        if self.group_size < 0:
            raise ConfigError(f"loss.group_size must be >= 0, not {self.group_size}")

    def caption(self, term: str) -> str:
        """Name of the caption that a term uses."""
        return self.captions.get(term, self.default_caption)

    def group(self, rows: int) -> int:
        """Rows of a group of negatives in a batch of `rows`; 0 for the whole batch."""
        return 0 if self.group_size >= rows else self.group_size

    def terms(self, media: str) -> tuple[str, ...]:
        """Terms of a media type's batches."""
        weights = self.weights
        if self.released_audio_mlm and media == "audio" and not weights.get("mlm"):
            weights = {**weights, "amlm": 0.0}
        return tuple(
            name
            for name in self.media.get(media, ())
            if weights.get(name)
            and not (name == "uta" and media != "image" and self.teacher_on_images_only)
        )

    def terms_of_any(self, media: Iterable[str]) -> tuple[str, ...]:
        """Every term that one of these media types runs, in the table's order."""
        running = {name for kind in media for name in self.terms(kind)}
        return tuple(name for name in TERMS if name in running)


@dataclass(frozen=True, kw_only=True)
class AlignConfig(PairConfig):
    """A stage-2 run.

    Attributes:
        stage2: The model.
        loss: Terms, weights and how they are computed.
        video_mask: Patches seen of videos in training.
        image_mask: Patches seen of images in training.
        teacher: Frozen teacher of the `uta` term and of `attention` masks.
        keep_texts: Compute a frozen text tower's features once for each caption and keep them; for
            contrasts of captions that are shown many times.
    """

    stage2: Stage2Config
    loss: AlignLossConfig = field(default_factory=AlignLossConfig)
    video_mask: VisionMask = field(default_factory=VisionMask)
    image_mask: VisionMask = field(default_factory=lambda: VisionMask(ratio=0.5))
    teacher: TeacherConfig | None = None
    keep_texts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_views(self.stage2.vision.encoder)
        for name, data in self.data.media.items():
            self._check_terms(f"data.media.{name}", data, self.loss.terms(name))
        self._check_heads()

    @property
    def model(self) -> Stage2Config:
        """The model's config."""
        return self.stage2

    def make_stage(self) -> AlignStage:
        """The stage.

        Raises:
          ConfigError: The teacher does not fit the vision tower.
        """
        from iv2_jax.train.align import AlignStage

        return AlignStage(self)

    def _check_terms(self, where: str, data: DataConfig, terms: tuple[str, ...]) -> None:
        """Captions that terms use are loaded."""
        if not terms:
            raise ConfigError(
                f"{where}: no term of loss.media weighs anything there; set loss.weights"
            )
        for term in terms:
            caption = self.loss.caption(term)
            if caption not in data.text.captions:
                raise ConfigError(
                    f"loss term {term!r} uses caption {caption!r}, but {where}.text.captions is "
                    f"{list(data.text.captions)}"
                )

    def _check_heads(self) -> None:
        """The model has what the terms need."""
        model, terms = self.stage2, self.loss.terms_of_any(self.data.media)
        needs = {
            "audio": (model.audio is not None, lambda t: TERMS[t].media != "video"),
            "av_fusion": (model.av_fusion, lambda t: t in ("avtc", "avtm")),
            "audio_matching": (model.audio_matching, lambda t: t == "atm"),
            "av_matching": (model.av_matching, lambda t: t == "avtm"),
            "text.mlm_head": (model.text.mlm_head, lambda t: TERMS[t].kind == "words"),
        }
        for part, (has, needed_by) in needs.items():
            for term in terms:
                if needed_by(term) and not has:
                    raise ConfigError(f"loss term {term!r} needs stage2.{part}")
        if self.loss.contrastive == "sigmoid" and model.contrast_bias_init is None:
            raise ConfigError("loss.contrastive='sigmoid' needs stage2.contrast_bias_init")
        masks = (self.video_mask.kind, self.image_mask.kind)
        if self.teacher is None and ("uta" in terms or "attention" in masks):
            raise ConfigError("the uta term and attention masks need config.teacher")
        if self.keep_texts:
            self._check_kept_texts(terms)

    def _check_kept_texts(self, terms: tuple[str, ...]) -> None:
        """What is kept is one feature a caption, of the weights that the run starts from."""
        for term in terms:
            if TERMS[term].kind in ("match", "words"):
                raise ConfigError(f"keep_texts: loss term {term!r} reads every word of a caption")
        if self.init_from or not any(init.tower in ("text", "model") for init in self.init):
            raise ConfigError("keep_texts needs the text tower's weights in config.init")
        if self.frozen_towers_in_train_mode:
            raise ConfigError("keep_texts: frozen_towers_in_train_mode draws dropout every time")
