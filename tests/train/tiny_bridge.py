"""Runs of a Q-Former's pretraining small enough for tests, and the same model in plain arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax import config as config_lib
from iv2_jax.models import zoo
from iv2_jax.models.bridge_pretraining import BridgePretrainingConfig
from iv2_jax.train.bridge import BridgeTrainConfig

LENGTH, VOCAB = 6, 128
START, CLS, SEP = VOCAB - 1, 2, 3


def model(*, drop: float = 0.0) -> BridgePretrainingConfig:
    """The encoder and bridge of the zoo's tiny chat model, without queries for instructions."""
    chat = zoo.get("test_tiny_chat")
    bridge = dataclasses.replace(
        chat.bridge,
        depth=2,
        num_extra_queries=0,
        vocab_size=VOCAB,
        project_down=False,
        init_std=0.2,
        dropout_rate=drop,
        attention_dropout_rate=drop,
        drop_path_rate=drop,
    )
    encoder = dataclasses.replace(chat.encoder, drop_path_rate=drop, layer_scale_init=0.5)
    return BridgePretrainingConfig(encoder, bridge, joint_width=8)


def values(config: BridgePretrainingConfig, **changes: Any) -> dict[str, Any]:
    """A run of the Q-Former on images and videos, in groups of four rows."""
    text = {"path": "unused", "max_length": LENGTH, "options": {"trailing_sep": True}}
    data = {"source": "unused", "size": config.encoder.image_size, "text": text}
    return {
        "stage": "bridge",
        "steps": 3,
        "batch_size": 8,
        "bridge_pretraining": config_lib.to_dict(config),
        "loss": {"start_id": START, "group_size": 4, "logits_share": 0.3},
        "data": {
            "media": {
                "image": {**data, "media": "image"},
                "video": {**data, "media": "video", "num_frames": config.encoder.num_frames},
            }
        },
        "optimizer": {"lr": 1e-2, "scale_lr_by_batch": False, "freeze": ["encoder/.*"]},
        "mesh": {"max_devices": 1},
        "tensorboard": False,
    } | changes


def config(**changes: Any) -> BridgeTrainConfig:
    """`values` of the tiny model as a checked config."""
    return config_lib.build(BridgeTrainConfig, values(model(), **changes))


def batch(seed: int = 0, *, rows: int = 8) -> dict[str, Any]:
    """Device arrays: captions of several lengths, one empty, two clips of one id."""
    rng = np.random.default_rng(seed)
    encoder = model().encoder
    ids = rng.integers(5, START, (rows, LENGTH)).astype(np.int32)
    ids[:, 0] = CLS
    for row in range(rows):
        end = 3 + row % 3
        ids[row, end], ids[row, end + 1 :] = SEP, 0
    ids[rows - 1, 1], ids[rows - 1, 2:] = SEP, 0
    side, match = encoder.image_size, np.arange(rows, dtype=np.int32)
    match[1] = match[0]
    return {
        "video": rng.integers(0, 256, (rows, encoder.num_frames, side, side, 3)).astype(np.uint8),
        "text_video": ids,
        "match_id": match,
    }


class Plain:
    """The Q-Former of given parameters as loops over its layers, one sequence after the other."""

    def __init__(self, params: Any, config: BridgePretrainingConfig, context: jax.Array) -> None:
        self.params, self.config = params["bridge"], config.bridge
        self.context = self._norm(self.params["vision_norm"], context)

    def embedded(self, ids: jax.Array | None, rows: int) -> jax.Array:
        """Words at their places, or the queries."""
        own = self.params["embeddings"]
        if ids is None:
            x = jnp.repeat(self.params["query_tokens"], rows, axis=0)
        else:
            x = own["word"][ids] + own["position"][: ids.shape[1]]
        return self._norm(own["norm"], x)

    def read(
        self, ids: jax.Array, mask: jax.Array, told: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and caption each alone, and the caption told with the queries' keys kept."""
        rows, length = ids.shape
        q, text, tell = (self.embedded(x, rows) for x in (None, ids, told))
        words = mask[:, None, None] > 0
        before = words & np.tri(length, dtype=bool)
        all_queries = np.ones((rows, 1, length, q.shape[1]), bool)
        for layer, reads in self._layers():
            kept = q
            q = self._queries(layer, self._attend(layer["attn"], q, q), reads)
            text = self._mlp(layer["mlp"], self._attend(layer["attn"], text, text, words))
            may = np.concatenate([all_queries, np.broadcast_to(before, before.shape)], axis=-1)
            sources = jnp.concatenate([kept, tell], axis=1)
            tell = self._mlp(layer["mlp"], self._attend(layer["attn"], tell, sources, may))
        return q, text, tell

    def joined(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and captions that see each other."""
        q, text = (self.embedded(x, len(ids)) for x in (None, ids))
        seen = np.concatenate([np.ones((len(ids), q.shape[1])), mask], axis=1)[:, None, None] > 0
        for layer, reads in self._layers():
            both = jnp.concatenate([q, text], axis=1)
            mixed = self._attend(layer["attn"], both, both, seen)
            q = self._queries(layer, mixed[:, : q.shape[1]], reads)
            text = self._mlp(layer["mlp"], mixed[:, q.shape[1] :])
        return q, text

    def _layers(self) -> Any:
        """Parameters of each layer, and whether it reads the clip."""
        every = self.config.cross_every
        for number in range(self.config.depth):
            group = self.params["groups"][f"layer_{number % every}"]
            yield jax.tree.map(lambda x, n=number: x[n // every], group), number % every == 0

    def _queries(self, layer: Any, x: jax.Array, reads: bool) -> jax.Array:
        if reads:
            x = self._attend(layer["cross_attn"], x, self.context)
        return self._mlp(layer["mlp_query"], x)

    def _attend(self, p: Any, x: jax.Array, source: jax.Array, may: Any = True) -> jax.Array:
        def heads(name: str, tokens: jax.Array) -> jax.Array:
            return jnp.einsum("bnc,chd->bhnd", tokens, p[name]["kernel"]) + p[name]["bias"][:, None]

        q, k, v = heads("q", x), heads("k", source), heads("v", source)
        scores = jnp.where(may, q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5, -jnp.inf)
        mixed = jax.nn.softmax(scores, axis=-1) @ v
        out = jnp.einsum("bhnd,hdc->bnc", mixed, p["proj"]["kernel"]) + p["proj"]["bias"]
        return self._norm(p["norm"], x + out)

    def _mlp(self, p: Any, x: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(x @ p["fc1"]["kernel"] + p["fc1"]["bias"], approximate=False)
        return self._norm(p["norm"], x + hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"])

    def _norm(self, p: Any, x: jax.Array) -> jax.Array:
        x = x - x.mean(axis=-1, keepdims=True)
        scale = jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + self.config.epsilon)
        return x / scale * p["scale"] + p["bias"]
