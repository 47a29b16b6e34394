"""Stage 2: multimodal alignment of video, sound, speech and text (paper 3.2, spec stage2 6 and 8).

One step sees one media type (or, mixed with padding, all of them); which arrays a batch has decides
what runs, and each media type has a step of its own, compiled before the first.

A batch, rows split over the mesh's data and fsdp axes:
  video           (B, T, H, W, 3) uint8, RGB: image (T = 1), video, audio_video
  fbank           (B, frames, mels) float32, normalised log-mel energies: audio, audio_video
  text_<caption>  (B, L) int32, token ids of the caption of that name, padded; only padding where a
                  row has none
  match_id        (B,) int32, rows of equal id are positives of each other
  has_video       (B,) bool, only in mixed batches
  has_audio       (B,) bool, with fbank: False for rows without usable sound
  valid           (B,) bool, evaluation only: False for the rows that fill up the last batch
and on the host only:
  media           the media type
  index, replaced (B,) int32, as in stage 1
A row counts in a term only if it has the media and the words that the term compares.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.data.mixing import MIXED
from iv2_jax.data.modalities import WITH_PICTURES, WITH_SOUND
from iv2_jax.errors import ConfigError
from iv2_jax.models import masking
from iv2_jax.models.teachers.base import Teacher, TeacherOutput
from iv2_jax.objectives import contrastive
from iv2_jax.train.align_config import AlignConfig, Towers, VisionMask
from iv2_jax.train.align_terms import BatchTerms, Draws, named_rng
from iv2_jax.train.kept_texts import PREFIX, KeptTexts
from iv2_jax.train.pairs import PairStage
from iv2_jax.train.stage import Batch, Metrics

# Parameters whose freezing makes a tower a frozen one.
_TOWERS = Towers(
    vision="vision_encoder/encoder/blocks/",
    text="text_encoder/text_layers/",
    audio="audio_encoder/",
    fusion="text_encoder/fusion_layers/",
)

# The contrast that retrieval of each media type is like.
_ASKED = {"image": "vtc", "video": "vtc", "audio": "atc", "audio_video": "avtc"}


class AlignStage(PairStage):
    """A stage-2 model and its terms."""

    def __init__(self, config: AlignConfig) -> None:
        super().__init__(config)
        self.teacher: Teacher | None = None
        if config.teacher is not None:
            self.teacher = config.teacher.make()
            self._check_teacher()
        self._trained = self._trained_towers()
        if config.keep_texts:
            self._check_text_is_frozen()

    def _check_text_is_frozen(self) -> None:
        fusion = _TOWERS.fusion.rstrip("/")
        for path in self.trained_paths():
            if path.startswith("text_encoder/") and not path.startswith(fusion):
                raise ConfigError(f"keep_texts: {path} is trained; freeze text_encoder/.* or not")

    def _check_teacher(self) -> None:
        """The decoders of the vision tower must fit the teacher."""
        heads, teacher, model = self.config.stage2.vision.clip, self.teacher, self.config.stage2
        if heads is None:
            raise ConfigError("config.teacher is given, but stage2.vision.clip is None")
        encoder = model.vision.encoder
        for name, ours, theirs in (
            ("clip.width", heads.width, teacher.width),
            ("clip.layers", len(heads.layers), teacher.num_layers),
            ("clip.has_cls", heads.has_cls, teacher.has_cls),
            ("clip grid", encoder.grid, teacher.grid(encoder.num_frames, encoder.image_size)),
            ("final_width", model.vision.final_width, teacher.pooled_width),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"stage2.vision.{name} is {ours}, teacher {self.config.teacher.name} gives "
                    f"{theirs}"
                )

    def _trained_towers(self) -> Towers:
        """Which towers have blocks that are trained."""
        paths = self.trained_paths()
        return Towers(*(any(p.startswith(prefix) for p in paths) for prefix in _TOWERS))

    def load_frozen(self) -> Any:
        """Weights of the teacher."""
        return {} if self.teacher is None else self.teacher.load()

    def abstract_frozen(self) -> Any:
        """Shapes of `load_frozen`."""
        if self.teacher is None:
            return {}
        return jax.eval_shape(self.teacher.boxed_init, jax.random.key(0))

    @functools.cached_property
    def _kept_texts(self) -> KeptTexts | None:
        """Captions' features that are computed once; None where they are computed every time."""
        if not self.config.keep_texts:
            return None
        params = self.starting_params()["text_encoder"]
        return KeptTexts(self.config.stage2.text, params, self.config.loss.words.pad_id)

    def train_batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless training batches from `start_step` on."""
        batches = super().train_batches(start_step)
        return batches if self._kept_texts is None else self._kept_texts.stream(batches)

    def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The held-out clips once, in order."""
        batches = super().eval_batches()
        return batches if self._kept_texts is None else self._kept_texts.stream(batches)

    def abstract_batches(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Arrays of each media type's batches."""
        kinds = super().abstract_batches(batch_size)
        if self.config.keep_texts:
            width = self.config.stage2.text.width
            feature = jax.ShapeDtypeStruct((batch_size, width), jnp.float32)
            for arrays in kinds.values():
                names = [name for name in arrays if name.startswith("text_")]
                arrays |= {PREFIX + name.removeprefix("text_"): feature for name in names}
        return kinds

    def tokens_per_clip(self, kind: str = "") -> int:
        """Tokens of all towers in training: visible patches, sound, and its captions."""
        config = self.config
        media = config.data.media.values() if kind == MIXED else [config.data.media[kind]]
        tokens = 0
        if any(data.media in WITH_PICTURES for data in media):
            mask = config.image_mask if kind == "image" else config.video_mask
            tokens += 1 + self._num_visible(mask, images=kind == "image")
        if any(data.media in WITH_SOUND for data in media):
            tokens += config.stage2.audio.num_tokens
        return tokens + max(data.text.max_length for data in media)

    def _num_visible(self, mask: VisionMask, *, images: bool) -> int:
        """Visible patches."""
        frames, height, width = self.config.stage2.vision.encoder.grid
        frames = 1 if images else frames
        if mask.kind == "none":
            return frames * height * width
        if mask.kind == "random":
            return masking.num_visible(frames * height * width, mask.ratio)
        return frames * masking.num_visible(height * width, mask.ratio)

    def loss_fn(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Metrics]:
        """Sum of the weighted terms of the batch's media type."""
        loss = self.config.loss
        names = self._names(batch)
        teacher = self._teach(frozen, batch, names, train)
        visible = self._visible(batch, teacher, rng) if train else None
        every = self.config.frozen_towers_in_train_mode
        towers = Towers(*(train and (on or every) for on in self._trained))
        draws = Draws(rng, loss, self.config.stage2.text.vocab_size)
        given = {"visible": visible, "teacher": teacher, "train": towers}
        terms = self.model.apply(
            {"params": params},
            method=lambda model: BatchTerms(model, loss, batch, names, draws, **given).compute(),
            rngs={name: named_rng(rng, name) for name in ("droppath", "dropout")},
        )
        total = sum(loss.weights[name] * value for name, value in terms.items())
        metrics = {f"loss_{name}": value for name, value in terms.items()}
        return total, metrics | {"temperature": params["temp"].astype(jnp.float32)}

    def _names(self, batch: Batch) -> tuple[str, ...]:
        """The terms of a batch."""
        loss = self.config.loss
        if "has_video" in batch:
            return loss.terms_of_any(self.config.data.media)
        return loss.terms(media_of(batch))

    def _teach(
        self, frozen: Any, batch: Batch, names: tuple[str, ...], train: bool
    ) -> TeacherOutput | None:
        """What the teacher gives of the batch's pictures, if anything needs it."""
        guides = train and "video" in batch and self._mask(batch).kind == "attention"
        if self.teacher is None or not (guides or "uta" in names):
            return None
        return jax.lax.stop_gradient(self.teacher(frozen, batch["video"]))

    def _mask(self, batch: Batch) -> VisionMask:
        is_image = batch["video"].shape[1] == 1
        return self.config.image_mask if is_image else self.config.video_mask

    def _visible(
        self, batch: Batch, teacher: TeacherOutput | None, rng: jax.Array
    ) -> jax.Array | None:
        """Draws the visible video tokens: (B, N) int32, sorted, class token first."""
        if "video" not in batch or self._mask(batch).kind == "none":
            return None
        mask, (rows, frames) = self._mask(batch), batch["video"].shape[:2]
        encoder = self.config.stage2.vision.encoder
        _, height, width = encoder.grid
        grid = (max(frames // encoder.tubelet, 1), height, width)
        rng = named_rng(rng, "mask")
        if mask.kind == "attention":
            given = self.teacher.saliency_grid(frames, encoder.image_size)
            saliency = masking.resize_saliency(teacher.saliency, given, grid)
            count = masking.num_visible(height * width, mask.ratio)
            noise = jax.random.exponential(rng, saliency.shape)
            return masking.attention_guided_visible(saliency, noise, count)
        drawn = grid if mask.kind == "random" else (1, height, width)
        saliency = masking.uniform_saliency(rows, drawn)
        noise = jax.random.exponential(rng, saliency.shape)
        count = masking.num_visible(drawn[0] * height * width, mask.ratio)
        visible = masking.attention_guided_visible(saliency, noise, count, scope="clip")
        return visible if mask.kind == "random" else _in_every_frame(visible, grid)

    def project(self, params: Any) -> Any:
        """Stores the clamped temperature, as the original does before every forward pass."""
        low, high = contrastive.MIN_TEMPERATURE, contrastive.MAX_TEMPERATURE
        return {**params, "temp": jnp.clip(params["temp"], low, high)}

    def asked_caption(self) -> str:
        """The caption that the contrast of the held-out media uses."""
        held = self.config.eval_data
        return self.config.loss.caption("vtc" if held is None else _ASKED[held.media])


def media_of(batch: Batch) -> str:
    """Media type of a batch that holds one."""
    if "video" in batch:
        if "fbank" in batch:
            return "audio_video"
        return "image" if batch["video"].shape[1] == 1 else "video"
    return "audio" if "fbank" in batch else "text"


def _in_every_frame(visible: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
    """Visible tokens (B, 1 + n) of one frame, repeated in all: (B, 1 + T n)."""
    frames, height, width = grid
    offsets = jnp.arange(frames, dtype=visible.dtype) * (height * width)
    patches = visible[:, None, 1:] + offsets[None, :, None]
    return jnp.concatenate([visible[:, :1], patches.reshape(len(visible), -1)], axis=1)
