"""Stage 3, before the language model: the Q-Former learns from captions (spec stage3 8.3).

Three terms: contrast of the queries' features with the caption's (VTC), matching with hard
negatives (VTM), and captioning (CAP). The encoder is frozen in the recipe (`optimizer.freeze`): it
is run forward only, in evaluation mode. Chats start from such a run by the tower `bridge`.

A batch, rows split over the mesh's data and fsdp axes:
  video           (B, T, H, W, 3) uint8, RGB; T = 1 for images
  text_<caption>  (B, L) int32, class token, words, end; 0 = padding, on the right; only padding
                  where a row has no caption
  match_id        (B,) int32, rows of equal id are positives of each other
  valid           (B,) bool, evaluation only: False for the rows that fill up the last batch
and on the host only `media`, `index` and `replaced`, as in stage 2. Batches of images and of videos
alternate, as the original's.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models.bridge import BridgeConfig
from iv2_jax.models.bridge_pretraining import BridgePretraining, BridgePretrainingConfig, Reading
from iv2_jax.models.text.bert import MaskedLMHead
from iv2_jax.models.text.bert_layers import Versions
from iv2_jax.objectives import contrastive, matching
from iv2_jax.objectives.labelled import IGNORED, labelled_loss
from iv2_jax.train.align_terms import named_rng
from iv2_jax.train.pairs import PairConfig, PairStage, RetrievalConfig
from iv2_jax.train.stage import Batch, Metrics

TERMS = ("vtc", "vtm", "cap")


@dataclass(frozen=True)
class BridgeLossConfig:
    """Which terms there are and how they are computed.

    Attributes:
        weights: term -> weight, of `vtc`, `vtm`, `cap`; what is not named is not computed.
        caption: name of the caption that is learnt from.
        group_size: rows among which hard negatives are found; the original's are its 128 rows a
            device. 0 takes the whole batch.
        negative_floor: added to the share that every possible negative has.
        start_id: token that a told caption begins with instead of the class token: `[DEC]`.
        smoothing: label smoothing of captions.
        logits_share: share of a batch's places whose logits are in memory at once; any gives the
            same numbers.
        frame_tokens: ids that every caption has besides its words: class token and end. Rows with
            no more have no words and count nowhere.
    """

    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TERMS, 1.0))
    caption: str = "video"
    group_size: int = 128
    negative_floor: float = 1e-4
    start_id: int = 30522
    smoothing: float = 0.1
    logits_share: float = 0.25
    frame_tokens: int = 2

    def __post_init__(self) -> None:
        for term, weight in self.weights.items():
            if term not in TERMS:
                raise ConfigError(f"loss.weights: no term {term!r}{nearest(term, TERMS)}")
            if weight < 0:
                raise ConfigError(f"loss.weights.{term} must be >= 0, not {weight}")
        if not any(self.weights.values()):
            raise ConfigError(f"loss.weights: give at least one of {', '.join(TERMS)} a weight")
        for name in ("group_size", "negative_floor", "start_id", "frame_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name} must be >= 0, not {getattr(self, name)}")
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"loss.smoothing must be in [0, 1), not {self.smoothing}")
        if not 0 < self.logits_share <= 1:
            raise ConfigError(f"loss.logits_share must be in (0, 1], not {self.logits_share}")

    def group(self, rows: int) -> int:
        """Rows of a group of negatives in a batch of `rows`; 0 for the whole batch."""
        return 0 if self.group_size >= rows else self.group_size


@dataclass(frozen=True, kw_only=True)
class BridgeTrainConfig(PairConfig):
    """A run of a Q-Former's pretraining.

    Attributes:
        bridge_pretraining: the model.
        loss: terms and weights.
        retrieval: not in the loop: a clip here is a set of queries, which the retrieval of
            stage 2 and CLIP does not compare. Held-out losses and accuracies are.
    """

    bridge_pretraining: BridgePretrainingConfig
    loss: BridgeLossConfig = field(default_factory=BridgeLossConfig)
    retrieval: RetrievalConfig = field(default_factory=lambda: RetrievalConfig(enabled=False))

    def __post_init__(self) -> None:
        super().__post_init__()
        model, loss = self.bridge_pretraining, self.loss
        self.check_pictures(model.encoder, loss.caption)
        for name, data in self.loaded().items():
            if data.text.max_length > model.bridge.max_length:
                raise ConfigError(
                    f"{name}.text.max_length={data.text.max_length} is more than "
                    f"bridge_pretraining.bridge.max_length={model.bridge.max_length}"
                )
        if "image" in self.data.media and model.encoder.image_positions == "none":
            raise ConfigError("data.media.image needs encoder.image_positions='shared' or 'own'")
        if loss.start_id >= model.bridge.vocab_size:
            raise ConfigError(
                f"loss.start_id={loss.start_id} is not below "
                f"bridge_pretraining.bridge.vocab_size={model.bridge.vocab_size}"
            )
        if self.retrieval.enabled:
            raise ConfigError("retrieval.enabled: there is none in this stage, set it to False")

    @property
    def model(self) -> BridgePretrainingConfig:
        """The model's config."""
        return self.bridge_pretraining

    def make_stage(self) -> BridgeStage:
        """The stage.

        Raises:
          ConfigError: A pattern of the optimizer matches nothing.
        """
        return BridgeStage(self)


class BridgeStage(PairStage):
    """A Q-Former and its three terms."""

    config: BridgeTrainConfig
    model: BridgePretraining

    def __init__(self, config: BridgeTrainConfig) -> None:
        super().__init__(config)
        trained = any(p.startswith("encoder/") for p in self.trained_paths())
        self._encoder_drops = trained or config.frozen_towers_in_train_mode

    def tokens_per_clip(self, kind: str = "") -> int:
        """Tokens of the encoder, queries, and the caption that is read and told."""
        model = self.config.model
        grid = model.encoder.image_grid if kind == "image" else model.encoder.grid
        text = self.config.data.media[kind].text.max_length
        return 1 + math.prod(grid) + model.bridge.num_tokens + 2 * text

    def asked_caption(self) -> str:
        """The caption that is trained."""
        return self.config.loss.caption

    def loss_fn(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Metrics]:
        """Weighted sum of the terms over all rows that have words."""
        del frozen
        loss = self.config.loss
        ids = jnp.asarray(batch[f"text_{loss.caption}"])
        valid = jnp.sum(ids > 0, axis=1) > loss.frame_tokens
        valid &= batch.get("valid", True)

        def terms(model: BridgePretraining) -> tuple[Metrics, Reading]:
            return self._pairs(model, batch, ids, valid, rng, train=train)

        streams = ("droppath", "dropout")
        found, reading = self.model.apply(
            {"params": params},
            method=terms,
            rngs={name: named_rng(rng, name) for name in streams} if train else {},
        )
        if loss.weights.get("cap"):
            found |= self._captions(params, reading.caption, ids, valid)
        total = sum(loss.weights[t] * found[f"loss_{t}"] for t in TERMS if loss.weights.get(t))
        return total, found | {"temperature": params["temp"].astype(jnp.float32)}

    def _pairs(
        self,
        model: BridgePretraining,
        batch: Batch,
        ids: jax.Array,
        valid: jax.Array,
        rng: jax.Array,
        *,
        train: bool,
    ) -> tuple[Metrics, Reading]:
        """Contrast and matching, and what captioning reads."""
        loss, weights = self.config.loss, self.config.loss.weights
        video = self.config.model.encoder.normalize(batch["video"])
        context = model.encode(video, train=train and self._encoder_drops)
        mask = (ids > 0).astype(jnp.int32)
        told = ids.at[:, 0].set(loss.start_id) if weights.get("cap") else None
        reading = model.read(context, ids, mask, told, train=train)
        temperature = contrastive.clamp_temperature(model.temp)
        found: Metrics = {}
        if weights.get("vtc"):
            found["loss_vtc"] = contrastive.contrastive_loss(
                reading.queries, reading.text, temperature, batch["match_id"], valid=valid
            )
        if weights.get("vtm"):
            negatives = self._negatives(reading, temperature, batch["match_id"], valid, rng)
            logits = self._match(model, context, ids, mask, negatives, train=train)
            has = [negative.found for negative in negatives]
            found["loss_vtm"] = matching.matching_loss(logits, *has, valid=valid)
            found["match_accuracy"] = _match_accuracy(logits, *has, valid)
        return found, reading

    def _negatives(
        self,
        reading: Reading,
        temperature: jax.Array,
        match_id: jax.Array,
        valid: jax.Array,
        rng: jax.Array,
    ) -> tuple[matching.Negatives, matching.Negatives]:
        """A wrong clip for each caption, and a wrong caption for each clip."""
        loss = self.config.loss
        mine = functools.partial(
            matching.mine_negatives,
            temperature=temperature,
            ids=match_id,
            valid=valid,
            group_size=loss.group(len(match_id)),
            floor=loss.negative_floor,
        )
        return (
            mine(named_rng(rng, "wrong media"), reading.text, reading.queries),
            mine(named_rng(rng, "wrong text"), reading.queries, reading.text),
        )

    def _match(
        self,
        model: BridgePretraining,
        context: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        negatives: tuple[matching.Negatives, matching.Negatives],
        *,
        train: bool,
    ) -> jax.Array:
        """Logits `(3B, 2)` of true pairs, captions with wrong clips, clips with wrong captions.

        A clip's captions lie beside each other and share its keys and values.
        """
        rows, group = len(ids), self.config.loss.group(len(ids))
        media, text = negatives

        def beside(x: jax.Array) -> jax.Array:
            wrong = matching.take_in_groups(x, text.index, group)
            return jnp.stack([x, wrong, x], axis=1).reshape(3 * rows, -1)

        swap = functools.partial(
            matching.take_in_groups, index=media.index, group_size=group
        )  # what the last caption of a clip reads
        logits = model.match(
            context, beside(ids), beside(mask), versions=Versions(3, swap), train=train
        )
        logits = logits.reshape(rows, 3, 2)[:, jnp.array([0, 2, 1])]
        return logits.swapaxes(0, 1).reshape(-1, 2)

    def _captions(
        self, params: Any, hidden: jax.Array, ids: jax.Array, valid: jax.Array
    ) -> Metrics:
        """Each word of a caption by those before it, over the words of all rows that count."""
        loss, bridge = self.config.loss, self.config.model.bridge
        labels = jnp.pad(ids[:, 1:], ((0, 0), (0, 1)))
        labels = jnp.where((labels > 0) & valid[:, None], labels, IGNORED)
        count = jnp.maximum(jnp.sum(labels >= 0), 1).astype(jnp.float32)
        result = labelled_loss(
            functools.partial(_word_logits, bridge),
            {"head": params["lm_head"], "word": params["bridge"]["embeddings"]["word"]},
            hidden,
            labels,
            jnp.broadcast_to(1 / count, (len(ids),)),
            capacity=max(1, round(labels.size * loss.logits_share)),
            smoothing=loss.smoothing,
        )
        return {"loss_cap": result.loss, "word_accuracy": result.hits}

    def project(self, params: Any) -> Any:
        """Stores the clamped temperature, as the original does every step."""
        low, high = contrastive.MIN_TEMPERATURE, contrastive.MAX_TEMPERATURE
        return {**params, "temp": jnp.clip(params["temp"], low, high)}


def _word_logits(
    config: BridgeConfig, head: Any, hidden: jax.Array, number: jax.Array, extra: Any
) -> jax.Array:
    """Logits (..., V) by the language head, whose output matrix is the word table."""
    del number, extra
    return MaskedLMHead(config).apply({"params": head["head"]}, hidden, head["word"])


def _match_accuracy(
    logits: jax.Array, has_media: jax.Array, has_text: jax.Array, valid: jax.Array
) -> jax.Array:
    """Share of pairs that are told right; a third of them are true."""
    right = jnp.argmax(logits, axis=-1) == (jnp.arange(len(logits)) < len(valid))
    counts = jnp.concatenate([valid, valid & has_media, valid & has_text])
    return jnp.sum(right & counts) / jnp.maximum(jnp.sum(counts), 1)
