"""Stage 3: a video encoder and a language model learn to talk (paper 3.3, spec stage3 2 to 8).

One step sees rows of one kind: videos, images or text alone, of one length and number of views.
`InstructConfig.rows` has the few shapes there are, and each has a step of its own, compiled before
the first.

A batch, rows split over the mesh's data and fsdp axes:
  tokens        (B, L) int32 ids; any at places of visual tokens
  visual_index  (B, L) int32 row of the views' visual tokens that stands there, -1 at text
  targets       (B, L) int32 ids that are learnt, negative elsewhere; scored by the position before
  segment_ids   (B, L) int32 conversations of a row, 0 at padding
  positions     (B, L) int32 from 0 on in every conversation
  video         (B, V, T, S, S, 3) uint8, or float32 in pixel units with tiles: not with text alone
  features      (B, V, M, C) instead of it where the encoder's tokens are kept
  bridge_ids, bridge_mask  (B, V, L') int32 text for the bridge, where it is told any
  unread        (B,) int32 conversations that left the loss because a file did not decode
and on the host only:
  media         the kind of batch, such as `video-1024`
  index         (B, S) int32 numbers of the conversations
  replaced      (B,) int32, as `unread`, for the loop's count
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from iv2_jax.data.instruct.batches import TokenBatches
from iv2_jax.data.instruct.loading import make_talk_loader, open_talks, shape_name
from iv2_jax.data.instruct.plan import KINDS, Shape
from iv2_jax.errors import ConfigError
from iv2_jax.models import kinds
from iv2_jax.models.chat import Chat, TrainedParts
from iv2_jax.models.llm import Llm
from iv2_jax.objectives.next_token import next_token_loss_of, target_weights
from iv2_jax.train import optim
from iv2_jax.train.align_terms import named_rng
from iv2_jax.train.init_towers import load_towers
from iv2_jax.train.instruct_config import InstructConfig
from iv2_jax.train.kept_features import KeptFeatures
from iv2_jax.train.stage import Batch, Metrics, Stage

_PARTS = TrainedParts(encoder="encoder/", bridge="bridge/", llm="llm/")
_TEXT_ARRAYS = ("tokens", "visual_index", "targets", "segment_ids", "positions")


class InstructStage(Stage):
    """A chat model and its next-token loss."""

    host_arrays: ClassVar[tuple[str, ...]] = (
        *("index", "replaced", "valid", "media"),
        *("mask", "clips", "view", "view_segment", "epoch", "cut"),
    )

    def __init__(self, config: InstructConfig) -> None:
        self.config = config
        self.parts = config.accumulate
        self.model = Chat(config.chat)
        self.trained = self._trained_parts()
        self._kept: dict[bool, KeptFeatures] = {}  # by whether they are for training
        if config.keep_features_gb and self.trained.encoder:
            raise ConfigError(
                "keep_features_gb needs a frozen encoder: set optimizer.freeze=['encoder/.*']"
            )

    def _trained_parts(self) -> TrainedParts:
        """Which parts have parameters that are trained."""
        params = kinds.of(self.config.chat).abstract_params(self.config.chat)
        paths = optim.trained_paths(self.config.optimizer, params)
        return TrainedParts(*(any(p.startswith(prefix) for p in paths) for prefix in _PARTS))

    def init_params(self, rng: jax.Array) -> Any:
        """Fresh parameters (boxed)."""
        return kinds.of(self.config.chat).init_params(self.config.chat, rng)

    def starting_params(self) -> Any:
        """What `init` names, as a part of the parameter tree."""
        return load_towers(self.config.init, self.config.chat)

    def abstract_frozen(self) -> Any:
        """No frozen models beside the trained one."""
        return {}

    @functools.cached_property
    def tokens(self) -> TokenBatches:
        """The training batches without pixels.

        Raises:
          ConfigError: there is no mix, or the tokenizer is another model's.
        """
        if not self.config.mix:
            raise ConfigError("mix is empty: name a file of conversations, or a .yaml of several")
        return self._open(self.config.mix, train=True)

    @functools.cached_property
    def eval_tokens(self) -> TokenBatches:
        """The held-out batches without pixels, every conversation once."""
        return self._open(self.config.eval_mix, train=False)

    def _open(self, mix: str, *, train: bool) -> TokenBatches:
        """The batches of a mix, of this process."""
        config = self.config
        tokenizer = config.talk.make_tokenizer()
        if tokenizer.vocab_size > config.chat.llm.vocab_size:
            raise ConfigError(
                f"talk.tokenizer has {tokenizer.vocab_size} ids, chat.llm.vocab_size is "
                f"{config.chat.llm.vocab_size}: it is another model's"
            )
        return open_talks(
            config.talk,
            mix,
            config.rows,
            config.load,
            seed=config.seed,
            train=train,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """Every kind of batch by name; without a mix the largest of each kind of media."""
        if self.config.mix:
            shapes = self.tokens.plan.shapes
        else:
            rows, length = self.config.rows, self.config.rows.lengths[-1]
            views = {kind: 0 if kind == "text" else rows.views[-1] for kind in KINDS}
            shapes = [Shape(kind, length, v, rows.rows(length)) for kind, v in views.items()]
        return {shape_name(shape): shape for shape in shapes}

    def abstract_batches(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Arrays of every kind of batch."""
        del batch_size  # a shape has its own
        return {name: self._abstract(shape) for name, shape in self.shapes.items()}

    def _abstract(self, shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
        """Arrays of one kind of batch."""
        talk = self.config.talk

        def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((shape.rows, *sizes), dtype)

        batch = {name: array(shape.length) for name in _TEXT_ARRAYS}
        batch["unread"] = array()
        if not shape.views:
            return batch
        frames = talk.view_config(shape.kind).frames
        pixels = jnp.uint8 if talk.tiling is None else jnp.float32
        if self.config.keep_features_gb:
            encoder = self.config.chat.encoder
            sizes = shape.views, self._tokens_per_view(shape), encoder.width
            batch["features"] = array(*sizes, dtype=encoder.precision.compute_dtype)
        else:
            batch["video"] = array(shape.views, frames, talk.size, talk.size, 3, dtype=pixels)
        if talk.bridge_text != "none":
            told = array(shape.views, talk.bridge_length)
            batch |= {"bridge_ids": told, "bridge_mask": told}
        return batch

    def weigh(self, batch: Batch) -> Batch:
        """Adds the weight of each row's targets, and what is counted over the whole batch."""
        targets = batch["targets"]
        rows = len(targets)
        count = jnp.sum(targets[:, 1:] >= 0).astype(jnp.float32)
        unread = jnp.sum(batch["unread"]).astype(jnp.float32)
        return {
            **batch,
            "weight": target_weights(targets, groups=self.config.loss.released_groups),
            "count": jnp.broadcast_to(count, (rows,)),
            "unread": jnp.broadcast_to(unread, (rows,)),
            "rows": jnp.full((rows,), rows, jnp.float32),
        }

    def loss_fn(
        self, params: Any, frozen: Any, batch: Batch, rng: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Metrics]:
        """The mean loss of the whole batch's targets, and its terms, of `weigh`'s batch."""
        del frozen
        modes = TrainedParts(False, False, False)
        if train:
            modes = self.trained
            if self.config.frozen_parts_in_train_mode:
                modes = TrainedParts(True, True, True)
        hidden = self.model.apply(
            {"params": params},
            batch["tokens"],
            batch["visual_index"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            **self._media(batch),
            train=modes,
            rngs={name: named_rng(rng, name) for name in ("dropout", "droppath")} if train else {},
            method="hidden",
        )
        head = "embed" if self.config.chat.llm.tied_head else "head"
        loss, hits = next_token_loss_of(
            functools.partial(_logits, Llm(self.config.chat.llm), modes.llm),
            {head: params["llm"][head]},
            hidden,
            batch["targets"],
            # Parts' losses are averaged: each is weighed as if there were nothing but its rows.
            batch["weight"] * (jnp.mean(batch["rows"]) / len(batch["tokens"])),
            capacity=self.config.loss.capacity(batch["tokens"].size),
            extra=named_rng(rng, "head"),
        )
        return loss, {
            "accuracy": hits,
            "targets": jnp.mean(batch["count"]),
            "padding": jnp.mean(batch["segment_ids"] == 0),
            "unread": jnp.mean(batch["unread"]),
        }

    def _media(self, batch: Batch) -> dict[str, jax.Array]:
        """What the bridge reads and is told; nothing with text alone."""
        media = {k: batch[k] for k in ("features", "bridge_ids", "bridge_mask") if k in batch}
        if "video" in batch:
            media["video"] = self.config.chat.encoder.normalize(batch["video"])
        return media

    def tokens_per_clip(self, kind: str = "") -> int:
        """Positions of a row, and tokens of its views."""
        shape = self.shapes[kind]
        return shape.length + shape.views * self._tokens_per_view(shape)

    def _tokens_per_view(self, shape: Shape) -> int:
        """Tokens that the encoder gives of a view."""
        frames, height, width = self.config.chat.encoder.grid
        return 1 + (1 if shape.kind == "image" else frames) * height * width

    def start(self, params: Any, mesh: Mesh) -> None:
        """Encodes all clips, if their tokens are kept."""
        config = self.config
        if not config.keep_features_gb:
            return
        if jax.process_count() > 1:
            raise ConfigError("keep_features_gb is for one process; set it to 0")
        left = config.keep_features_gb * 2**30
        for train in (True, False) if config.eval_mix else (True,):
            tokens = self.tokens if train else self.eval_tokens
            log, threads = config.load.bad_clip_log, config.load.threads
            kept = KeptFeatures(
                self.model, config.talk, tokens, max_bytes=left, threads=threads, log=log
            )
            kept.fill(params, mesh, config.batch_size, config.load.max_bad_share)
            left -= kept.num_bytes
            self._kept[train] = kept

    def train_batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless training batches from `start_step` on."""
        yield from self._batches(self.tokens, train=True, start_step=start_step)

    def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The held-out conversations once, in order; a batch counts by its targets."""
        if not self.config.eval_mix:
            return
        for batch in self._batches(self.eval_tokens, train=False):
            # The loop weighs a batch by the mean of `valid`.
            count = np.sum(batch["targets"][:, 1:] >= 0)
            yield batch | {"valid": np.asarray([count], np.float32)}

    def _batches(
        self, tokens: TokenBatches, *, train: bool, start_step: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Batches of this process, read ahead."""
        config = self.config
        with make_talk_loader(
            tokens,
            config.talk,
            config.load,
            seed=config.seed,
            train=train,
            start_step=start_step,
            pixels=not config.keep_features_gb,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ) as loader:
            for batch in loader:
                if config.keep_features_gb:
                    batch = self._kept[train].add(batch)
                yield batch | {"replaced": batch["unread"]}


def _logits(
    llm: Llm, train: bool, head: Any, hidden: jax.Array, number: jax.Array, key: jax.Array
) -> jax.Array:
    """Logits (..., V) of hidden states by the head's parameters; each round drops others."""
    rngs = {"dropout": jax.random.fold_in(key, number)} if train else {}
    return llm.apply({"params": head}, hidden, train, method="logits", rngs=rngs)
