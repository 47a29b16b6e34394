"""The Q-Former before any language model: contrast, matching and captioning (spec stage3 8.3).

Behind the video encoder stand the bridge's Q-Former, under the same names as in a dialogue model
(`bridge/...`, without the projection to the language model), and heads that only this stage has.
Losses are in `objectives` and `train.bridge`; the methods here give what they need.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models.bridge import Bridge, BridgeConfig
from iv2_jax.models.checks import require_sizes
from iv2_jax.models.layers import Linear, boxed
from iv2_jax.models.text.bert import MaskedLMHead
from iv2_jax.models.text.bert_layers import SELF_MASK_SCORE, Versions, self_attention_bias
from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder


@dataclasses.dataclass(frozen=True)
class BridgePretrainingConfig:
    """A video encoder, the Q-Former behind it, and heads.

    Attributes:
        encoder: the video encoder, all of whose tokens the Q-Former reads, the class token too.
        bridge: the Q-Former; its `llm_width` means nothing yet.
        joint_width: features of queries and text where they are contrasted.
        temp_init: temperature at the start.

    Raises:
        ConfigError: widths do not fit, the Q-Former reads no text, or the encoder pools for
            nothing.
    """

    encoder: EncoderConfig
    bridge: BridgeConfig
    joint_width: int = 768
    temp_init: float = 0.07

    def __post_init__(self) -> None:
        require_sizes(self, ("joint_width",))
        if self.encoder.width != self.bridge.context_width:
            raise ConfigError(
                f"encoder.width={self.encoder.width} is not "
                f"bridge.context_width={self.bridge.context_width}"
            )
        if self.encoder.pool:
            raise ConfigError("encoder.pool=True: nothing reads the pool, set it to False")
        if not self.bridge.text:
            raise ConfigError("bridge.text=False: captions are what this stage learns from")
        if self.temp_init <= 0:
            raise ConfigError(f"temp_init={self.temp_init}: must be positive")


@flax.struct.dataclass
class Reading:
    """What the Q-Former gives of clips and captions that do not see each other.

    Attributes:
        queries: `(B, K, joint_width)` features of the clip, one for each of K queries.
        text: `(B, joint_width)` feature of the caption.
        caption: `(B, L, width)` what the language head reads, or None where no captions are told.
    """

    queries: jax.Array
    text: jax.Array
    caption: jax.Array | None


class BridgePretraining(nn.Module):
    """Video encoder, Q-Former and the heads of its pretraining.

    Attributes:
        config: the parts.
    """

    config: BridgePretrainingConfig

    def setup(self) -> None:
        """Makes the parts; `bridge` has all that a dialogue model's has but the projections."""
        c = self.config
        width, precision = c.bridge.width, c.bridge.precision
        self.encoder = VideoEncoder(c.encoder)
        self.bridge = Bridge(c.bridge)
        joint = ((width,), (c.joint_width,), ("embed",), (None,))
        self.vision_proj = Linear(*joint, precision=precision)
        self.text_proj = Linear(*joint, precision=precision)
        pair = ((2 * width,), (2,), ("embed",), (None,))
        self.match_head = Linear(*pair, precision=precision)
        self.lm_head = MaskedLMHead(c.bridge)
        init = boxed(nn.initializers.constant(c.temp_init))
        self.temp = self.param("temp", init, (), jnp.float32)

    def __call__(self, video: jax.Array, ids: jax.Array) -> tuple[Reading, jax.Array, jax.Array]:
        """Runs everything once, without padding; makes all parameters.

        Args:
            video: `(B, T, H, W, 3)`, normalised.
            ids: int `(B, L)`.

        Returns:
            `Reading`, matching logits `(B, 2)` and logits of words `(B, L, vocab_size)`.
        """
        context, mask = self.encode(video), jnp.ones(ids.shape, jnp.int32)
        reading = self.read(context, ids, mask, ids)
        words = self.lm_head(reading.caption, self.bridge.embeddings.word)
        return reading, self.match(context, ids, mask), words

    def encode(self, video: jax.Array, *, train: bool = False) -> jax.Array:
        """Tokens `(B, M, C)` of a video `(B, T, H, W, 3)`, class token first."""
        return self.encoder(video, train=train).tokens

    def read(
        self,
        context: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        told: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> Reading:
        """Reads clips and captions, each for itself, and captions told from the clips.

        One pass does for all three, each seeing what it may: queries see queries, the caption
        sees itself, and the caption that is told sees the queries and its own words up to each.
        The queries' keys and values are made once, as with the original's cache.

        Args:
            context: `(B, M, C)` the encoder's tokens.
            ids: int `(B, L)` captions, class token first, padded on the right.
            mask: `(B, L)`, 1 = token, 0 = padding.
            told: int `(B, L)`, the same captions as they are told: beginning with the start token
                instead of the class token. None leaves captioning out.
            train: turns dropout and DropPath on (rng streams `dropout` and `droppath`).

        Returns:
            `Reading`.
        """
        queries, length = self.config.bridge.num_tokens, ids.shape[1]
        x = [self.bridge.embed(len(ids), train=train), self.bridge.embed_text(ids, train=train)]
        if told is not None:
            x.append(self.bridge.embed_text(told, train=train))
        bias = reading_bias(mask, queries, with_told=told is not None)
        hidden = self.bridge.hidden(jnp.concatenate(x, axis=1), context, bias, train=train)
        return Reading(
            self.vision_proj(hidden[:, :queries]),
            self.text_proj(hidden[:, queries]),
            None if told is None else hidden[:, queries + length :],
        )

    def match(
        self,
        context: jax.Array,
        ids: jax.Array,
        mask: jax.Array,
        *,
        versions: Versions | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Judges whether clips and captions, which now see each other, belong together.

        Args:
            context: `(B, M, C)` the encoder's tokens.
            ids: int `(B, L)`, or with `versions` `(B * count, L)`, captions of a clip beside each
                other.
            mask: of the same shape, 1 = token.
            versions: several captions are set against one clip.
            train: as in `read`.

        Returns:
            `(B, 2)`, or `(B * count, 2)`, logits; class 1 = they belong together.
        """
        queries = self.config.bridge.num_tokens
        seen = jnp.ones((len(ids), queries), jnp.float32)
        bias = self_attention_bias(jnp.concatenate([seen, mask], axis=1))
        x = self.bridge.embed(len(ids), ids, train=train)
        x = self.bridge.hidden(x, context, bias, versions=versions, train=train)
        mean = jnp.mean(x[:, :queries].astype(jnp.float32), axis=1)
        return self.match_head(jnp.concatenate([mean, x[:, queries].astype(jnp.float32)], axis=-1))


def reading_bias(mask: jax.Array, num_queries: int, *, with_told: bool) -> jax.Array:
    """Who sees whom in `BridgePretraining.read`.

    Args:
        mask: `(B, L)` of the captions, 1 = token, 0 = padding.
        num_queries: K.
        with_told: the captions that are told stand behind.

    Returns:
        float32 `(B, 1, N, N)`, added to the scores; N = K + L, or K + 2L.
    """
    length = mask.shape[1]
    total = num_queries + length * (2 if with_told else 1)
    queries, text, told = (
        slice(0, num_queries),
        slice(num_queries, num_queries + length),
        slice(num_queries + length, total),
    )
    may = np.zeros((total, total), bool)
    may[queries, queries] = may[text, text] = True
    if with_told:
        may[told, queries] = True
        may[told, told] = np.tri(length, dtype=bool)
    words = [mask > 0] * (2 if with_told else 1)
    keys = jnp.concatenate([jnp.ones((len(mask), num_queries), bool), *words], axis=1)
    return jnp.where(may[None, None] & keys[:, None, None], 0.0, SELF_MASK_SCORE)
