"""InternVideo2-CLIP: contrast of pooled video with pooled text over frozen towers (spec stage2 7).

The recipes train the attentive pool, the temperature and, in the small models, the map to the
text's width; everything else is frozen (`optimizer.freeze`), is run forward only and has no
optimizer state. Without freezing the same stage is the full fine-tune; with adapters in the text
tower (`clip.text.decoder.lora`) and only those open, it is LoRA.

A batch, rows split over the mesh's data and fsdp axes:
  video           (B, T, H, W, 3) uint8, RGB; T = 1 for images
  text_<caption>  (B, L) int32, token ids, 0 = padding; only padding where a row has no caption
  match_id        (B,) int32, rows of equal id are positives of each other
  valid           (B,) bool, evaluation only: False for the rows that fill up the last batch
and on the host only `media`, `index` and `replaced`, as in stage 2. Batches of images and of videos
alternate, as the original's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from iv2_jax.errors import ConfigError
from iv2_jax.models.clip import ClipConfig, SmallClipConfig
from iv2_jax.objectives import contrastive
from iv2_jax.train.pairs import PairConfig, PairStage
from iv2_jax.train.stage import Batch, Metrics


@dataclass(frozen=True)
class ClipLossConfig:
    """How the contrast is computed (spec stage2 6.1).

    Attributes:
        caption: Name of the caption that is compared.
        form: `dense`, `chunked` or `ring`: the same numbers with less memory and more code.
        feature_gradient: Factor of the gradient through the features. The released code has
            1 / devices (1/16, trap 11.4); 1 is the true gradient.
        frame_tokens: Ids that every caption has besides its words: 2 (start and end) of the small
            models, 5 (start, "summarize:" in three, end) of the large ones. Rows with no more ids
            have no words and count nowhere.
    """

    caption: str = "video"
    form: Literal["dense", "chunked", "ring"] = "dense"
    feature_gradient: float = 1.0
    frame_tokens: int = 2

    def __post_init__(self) -> None:
        if self.frame_tokens < 0:
            raise ConfigError(f"loss.frame_tokens must be >= 0, not {self.frame_tokens}")


@dataclass(frozen=True, kw_only=True)
class ClipTrainConfig(PairConfig):
    """A run of a CLIP model.

    Attributes:
        clip: A large model, or None.
        clip_small: A small model, or None; exactly one of both is given.
        loss: How the contrast is computed.
    """

    clip: ClipConfig | None = None
    clip_small: SmallClipConfig | None = None
    loss: ClipLossConfig = field(default_factory=ClipLossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.clip is None) == (self.clip_small is None):
            raise ConfigError("give one of clip (1B, 6B) and clip_small (S, B, L)")
        self.check_pictures(self.model.vision, self.loss.caption)
        if "image" in self.data.media and self.model.vision.image_positions == "none":
            raise ConfigError("data.media.image needs vision.image_positions='shared'")
        if self.retrieval.rerank_top:
            raise ConfigError("retrieval.rerank_top: a CLIP model has no matching head, set 0")

    @property
    def model(self) -> ClipConfig | SmallClipConfig:
        """The model's config."""
        return self.clip if self.clip is not None else self.clip_small

    def make_stage(self) -> ClipStage:
        """The stage.

        Raises:
          ConfigError: A pattern of the optimizer matches nothing.
        """
        return ClipStage(self)


class ClipStage(PairStage):
    """A CLIP model and its contrast."""

    config: ClipTrainConfig

    def __init__(self, config: ClipTrainConfig) -> None:
        super().__init__(config)
        trained = self.trained_paths()
        every = config.frozen_towers_in_train_mode
        self._drops = {
            # An open pool leaves the blocks frozen: what drops are the blocks' paths.
            "vision": every or any(p.startswith("vision_encoder/blocks/") for p in trained),
            "text": every or any(p.startswith("text_encoder/") for p in trained),
        }

    def tokens_per_clip(self, kind: str = "") -> int:
        """Tokens of both towers: all patches (nothing is masked) and the caption."""
        vision = self.config.model.vision
        grid = vision.image_grid if kind == "image" else vision.grid
        return 1 + math.prod(grid) + self.config.data.media[kind].text.max_length

    def asked_caption(self) -> str:
        """The caption that is trained is the one that asks in retrieval."""
        return self.config.loss.caption

    def loss_fn(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Metrics]:
        """The contrast of all rows that have words, with soft targets for equal ids."""
        del frozen
        loss, encoder = self.config.loss, self.config.model.vision
        ids = jnp.asarray(batch[f"text_{loss.caption}"])
        valid = jnp.sum(ids > 0, axis=1) > loss.frame_tokens
        valid &= batch.get("valid", True)
        # A row of nothing but padding has no token to pool; what it gives does not count.
        ids = ids.at[:, 0].max(1)
        streams = jax.random.split(rng)

        def features(model: Any) -> tuple[jax.Array, jax.Array]:
            video = encoder.normalize(batch["video"])
            vision = model.encode_vision(video, train=train and self._drops["vision"])
            text = model.encode_text(ids, train=train and self._drops["text"])
            return vision, text.pooled

        pair = self.model.apply(
            {"params": params},
            method=features,
            rngs=dict(zip(("droppath", "dropout"), streams, strict=True)),
        )
        vision, text = (contrastive.scale_gradient(x, loss.feature_gradient) for x in pair)
        temperature = contrastive.clamp_temperature(
            params["temp"], self.config.model.temp_min, None
        )
        value = contrastive.contrastive_loss(
            vision, text, temperature, batch["match_id"], valid=valid, form=loss.form
        )
        return value, {"loss_vtc": value, "temperature": temperature}

    def project(self, params: Any) -> Any:
        """Stores the clamped temperature: never below `temp_min` (trap 11.27)."""
        return {**params, "temp": jnp.maximum(params["temp"], self.config.model.temp_min)}
