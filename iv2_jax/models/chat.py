"""The dialogue model: video encoder, bridge and language model (spec stage3 1 to 3).

A sample has one view, or several (high-definition input: tiles and a global view, see
`data.tiles`). Each view is encoded on its own and becomes K visual tokens; they stand in the
language model's input where `data.dialogue` left slots for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models import bridge as bridge_lib
from iv2_jax.models import llm as llm_lib
from iv2_jax.models.bridge import Bridge, BridgeConfig
from iv2_jax.models.decoding import Generated, GenerationConfig
from iv2_jax.models.generate import generate
from iv2_jax.models.layers import gather_tokens
from iv2_jax.models.llm import Llm, LlmConfig
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """A video encoder, the bridge behind it and the language model behind that.

    Attributes:
        encoder: the video encoder, whose last block's tokens, the class token among them, the
            bridge reads; None for features made elsewhere (VideoChat2's encoder is another).
        bridge: Q-Former and projection.
        llm: the language model.
        bos_as_number: fills the first position with the number that is the first token's id, as
            VideoChat2's training did by mistake, instead of embedding it (spec stage3 trap 2).

    Raises:
        ConfigError: widths do not fit, or the encoder pools for nothing.
    """

    encoder: EncoderConfig | None
    bridge: BridgeConfig
    llm: LlmConfig
    bos_as_number: bool = False

    def __post_init__(self) -> None:
        if self.encoder is not None:
            if self.encoder.width != self.bridge.context_width:
                raise ConfigError(
                    f"encoder.width={self.encoder.width} is not "
                    f"bridge.context_width={self.bridge.context_width}"
                )
            if self.encoder.pool:
                raise ConfigError("encoder.pool=True: nothing reads the pool, set it to False")
        if self.bridge.llm_width != self.llm.decoder.width:
            raise ConfigError(
                f"bridge.llm_width={self.bridge.llm_width} is not "
                f"llm.decoder.width={self.llm.decoder.width}"
            )


class TrainedParts(NamedTuple):
    """Which parts drop paths and values: dropout and DropPath, of those that have any."""

    encoder: bool
    bridge: bool
    llm: bool


def parts_of(train: bool | TrainedParts) -> TrainedParts:
    """The same said of every part."""
    return train if isinstance(train, TrainedParts) else TrainedParts(train, train, train)


@flax.struct.dataclass
class ChatOutput:
    """What the model gives.

    Attributes:
        logits: float32 `(B, L, vocab_size)`; row i scores the token after i. What stands at
            padding means nothing.
        embeddings: `(B, L, width)` what entered the language model.
        visual: `(B, V * K, width)` visual tokens of each sample's views, or None without media.
    """

    logits: jax.Array
    embeddings: jax.Array
    visual: jax.Array | None


class Chat(nn.Module):
    """Video encoder, bridge and language model; a batch is what `data.dialogue.pad_batch` gives.

    Attributes:
        config: the parts.
    """

    config: ChatConfig

    def setup(self) -> None:
        """Makes `encoder`, `bridge` and `llm`."""
        c = self.config
        if c.encoder is not None:
            self.encoder = VideoEncoder(c.encoder)
        self.bridge = Bridge(c.bridge)
        self.llm = Llm(c.llm)

    def __call__(
        self,
        tokens: jax.Array,
        visual_index: jax.Array,
        mask: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        video: jax.Array | None = None,
        features: jax.Array | None = None,
        bridge_ids: jax.Array | None = None,
        bridge_mask: jax.Array | None = None,
        train: bool | TrainedParts = False,
    ) -> ChatOutput:
        """Scores every token of a batch of dialogues.

        Args:
            tokens: int `(B, L)` ids; any at slots.
            visual_index: int `(B, L)`, row of the sample's visual tokens that fills a slot, views
                one after the other; -1 at text.
            mask: bool `(B, L)`, False at padding; None for none.
            segment_ids: int `(B, L)` of packed rows, see `llm_layers.Decoder`; then no `mask` is
                needed. None: a row is one dialogue.
            positions: int `(B, L)` from 0 on in every dialogue; None counts them.
            video: see `visual_tokens`; None, with `features` None too, for text alone.
            features: see `visual_tokens`.
            bridge_ids: see `visual_tokens`.
            bridge_mask: see `visual_tokens`.
            train: dropout and DropPath (rng streams `dropout` and `droppath`), of all parts or of
                those named.

        Returns:
            `ChatOutput`.

        Raises:
            ConfigError: an input does not fit the config.
        """
        seen = {"video": video, "features": features}
        told = {"bridge_ids": bridge_ids, "bridge_mask": bridge_mask}
        places = {"segment_ids": segment_ids, "positions": positions}
        hidden, embeddings, visual = self._read(
            tokens, visual_index, mask, **places, **seen, **told, train=train
        )
        return ChatOutput(self.llm.logits(hidden, parts_of(train).llm), embeddings, visual)

    def hidden(
        self,
        tokens: jax.Array,
        visual_index: jax.Array,
        mask: jax.Array | None = None,
        **inputs: Any,
    ) -> jax.Array:
        """What the language model's head reads, `(B, L, width)`; arguments as in the call.

        For losses that need the logits of some places alone.
        """
        return self._read(tokens, visual_index, mask, **inputs)[0]

    def _read(
        self,
        tokens: jax.Array,
        visual_index: jax.Array,
        mask: jax.Array | None,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        train: bool | TrainedParts = False,
        **media: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Hidden states `(B, L, width)`, what entered, and the visual tokens."""
        embeddings, visual = self.prompt(
            tokens, visual_index, positions=positions, **media, train=train
        )
        out = self.llm.hidden(
            embeddings,
            mask=mask,
            segment_ids=segment_ids,
            positions=positions,
            train=parts_of(train).llm,
        )
        return out.hidden, embeddings, visual

    def prompt(
        self,
        tokens: jax.Array,
        visual_index: jax.Array,
        *,
        positions: jax.Array | None = None,
        video: jax.Array | None = None,
        features: jax.Array | None = None,
        bridge_ids: jax.Array | None = None,
        bridge_mask: jax.Array | None = None,
        train: bool | TrainedParts = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Makes what enters the language model; arguments as in the call.

        Returns:
            Embeddings `(B, L, width)` and visual tokens `(B, V * K, width)` or None.
        """
        visual = None
        if video is not None or features is not None:
            visual = self.visual_tokens(
                video,
                features=features,
                bridge_ids=bridge_ids,
                bridge_mask=bridge_mask,
                train=train,
            )
        return self.embed(tokens, visual_index, visual, positions), visual

    def visual_tokens(
        self,
        video: jax.Array | None = None,
        *,
        features: jax.Array | None = None,
        bridge_ids: jax.Array | None = None,
        bridge_mask: jax.Array | None = None,
        train: bool | TrainedParts = False,
    ) -> jax.Array:
        """Encodes the views of each sample, each on its own.

        Args:
            video: `(B, V, T, H, W, 3)` normalised pixels of V views, or `(B, T, H, W, 3)` of one.
                Samples with fewer views than others are filled up with any: no slot names them.
            features: `(B, V, M, C)` tokens of another video encoder, or `(B, M, C)` of one view,
                instead of `video`.
            bridge_ids: int `(B, L')` text for the bridge, told to it with every view, or `(B, V,
                L')`, each view's own; None for none.
            bridge_mask: of the same shape, 1 = token, 0 = padding; None for no padding.
            train: as in the call.

        Returns:
            `(B, V * K, width of the language model)`, view after view.

        Raises:
            ConfigError: there are both or neither of `video` and `features`, or a video for a
                model without encoder.
        """
        if (video is None) == (features is None):
            raise ConfigError("give either video or features")
        train = parts_of(train)
        if features is None:
            features = self.encode(video, train=train.encoder)
        elif features.ndim == 3:
            features = features[:, None]
        batch, views = features.shape[:2]
        features = features.reshape(batch * views, *features.shape[2:])
        told = (_by_view(text, batch, views) for text in (bridge_ids, bridge_mask))
        out = self.bridge(features, *told, train=train.bridge)
        return out.tokens.reshape(batch, -1, out.tokens.shape[-1])

    def embed(
        self,
        tokens: jax.Array,
        visual_index: jax.Array,
        visual: jax.Array | None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Embeds tokens and puts visual tokens into their slots.

        Args:
            tokens: int `(B, L)`.
            visual_index: int `(B, L)`; -1 at text.
            visual: `(B, V * K, width)`; None for text alone, whose slots would give NaN.
            positions: int `(B, L)` of packed rows, which say where dialogues begin.

        Returns:
            `(B, L, width)`; NaN where an id or a slot names nothing that is there.
        """
        x = self.llm.embed_tokens(tokens)
        is_slot = (visual_index >= 0)[..., None]
        if visual is None:
            x = jnp.where(is_slot, jnp.nan, x)
        else:
            rows = gather_tokens(visual, jnp.maximum(visual_index, 0))
            x = jnp.where(is_slot, rows.astype(x.dtype), x)
        if self.config.bos_as_number:
            first = jnp.arange(tokens.shape[1])[None] == 0 if positions is None else positions == 0
            x = jnp.where(first[..., None], tokens[..., None].astype(x.dtype), x)
        return x

    def encode(self, video: jax.Array, *, train: bool = False) -> jax.Array:
        """Tokens `(B, V, M, C)` of every view of a video: the `features` of the call.

        Args:
            video: see `visual_tokens`.
            train: DropPath.

        Raises:
            ConfigError: the model has no encoder, or the video another number of dimensions.
        """
        if self.config.encoder is None:
            raise ConfigError("encoder=None: this model takes features, not a video")
        if video.ndim == 5:
            video = video[:, None]
        if video.ndim != 6:
            raise ConfigError(
                f"video has shape {tuple(video.shape)}; (B, V, T, H, W, 3) or (B, T, H, W, 3) "
                "is needed"
            )
        batch, views = video.shape[:2]
        out = self.encoder(video.reshape(batch * views, *video.shape[2:]), train=train)
        return out.tokens.reshape(batch, views, *out.tokens.shape[1:])


def _by_view(text: jax.Array | None, batch: int, views: int) -> jax.Array | None:
    """Text of rows `(B, L')` or of views `(B, V, L')` as `(B * V, L')`."""
    if text is None or text.ndim == 3:
        return text if text is None else text.reshape(batch * views, text.shape[-1])
    return jnp.repeat(text, views, axis=0)


def generate_answers(
    model: Chat,
    params: Mapping[str, Any],
    config: GenerationConfig,
    tokens: jax.Array,
    visual_index: jax.Array,
    mask: jax.Array | None = None,
    *,
    rng: jax.Array | None = None,
    **media: jax.Array | None,
) -> Generated:
    """Answers a batch of prompts (`SequenceBuilder.build` of conversations without last answer).

    Args:
        model: the model.
        params: its parameters, unboxed.
        config: how tokens are chosen and when an answer ends.
        tokens: int `(B, L)` ids; any at slots.
        visual_index: int `(B, L)`, see `Chat`.
        mask: bool `(B, L)`, False at padding, left or right; None for none.
        rng: key for sampling.
        **media: `video` or `features`, `bridge_ids` and `bridge_mask` of `Chat`.

    Returns:
        New tokens, their number and their score for each row.

    Raises:
        ConfigError: an input does not fit the model.
    """
    embeddings, _ = embed_prompts(model, params, tokens, visual_index, media)
    llm = Llm(model.config.llm)
    return generate(llm, params["llm"], config, embeddings=embeddings, mask=mask, rng=rng)


@partial(jax.jit, static_argnames="model")
def embed_prompts(
    model: Chat,
    params: Mapping[str, Any],
    tokens: jax.Array,
    visual_index: jax.Array,
    media: dict[str, jax.Array | None],
) -> tuple[jax.Array, jax.Array | None]:
    """Makes what enters the language model, compiled once for each shape.

    Args:
        model: the model.
        params: its parameters, unboxed.
        tokens: int `(B, L)`.
        visual_index: int `(B, L)`.
        media: keyword arguments of `Chat.prompt`.

    Returns:
        Embeddings `(B, L, width)` and visual tokens `(B, V * K, width)` or None.
    """
    return model.apply({"params": params}, tokens, visual_index, **media, method="prompt")


# Spec stage3 2.1: 39 of the 1B encoder's 40 blocks, images placed by a table of their own, and the
# exact GELU that the released code computes.
CHAT_ENCODER = EncoderConfig(
    width=1408,
    depth=39,
    num_heads=16,
    mlp_width=6144,
    drop_path_rate=0.25,
    image_positions="own",
    pool=False,
    tanh_gelu=False,
)

_BRIDGE = bridge_lib.ZOO["bridge_internvideo2_chat"]

ZOO: dict[str, ChatConfig] = {
    "internvideo2_chat_8b": ChatConfig(CHAT_ENCODER, _BRIDGE, llm_lib.ZOO["mistral_7b_lora"]),
    "internvideo2_chat_8b_merged": ChatConfig(CHAT_ENCODER, _BRIDGE, llm_lib.ZOO["mistral_7b"]),
    # Sixteen frames (HD-F16): the table of positions is resized when the weights are read.
    "internvideo2_chat_8b_f16": ChatConfig(
        dataclasses.replace(CHAT_ENCODER, num_frames=16), _BRIDGE, llm_lib.ZOO["mistral_7b_lora"]
    ),
    "internvideo2_chat_8b_internlm2_5": ChatConfig(
        CHAT_ENCODER, _BRIDGE, llm_lib.ZOO["internlm2_5_7b_lora"]
    ),
    # VideoChat2's: its encoder, UMT-L, is another; features are given.
    "videochat2_mistral": ChatConfig(
        None,
        bridge_lib.ZOO["bridge_videochat2"],
        llm_lib.ZOO["mistral_7b_v0_2"].with_lora(LoraConfig(16, 32.0, 0.1), head=True),
    ),
    # For tests: every part of the large ones.
    "test_tiny_chat": ChatConfig(
        EncoderConfig(
            width=32,
            depth=2,
            num_heads=2,
            mlp_width=48,
            image_size=28,
            num_frames=2,
            pool_heads=2,
            image_positions="own",
            pool=False,
            tanh_gelu=False,
        ),
        dataclasses.replace(bridge_lib.ZOO["test_tiny_bridge"], context_width=32),
        llm_lib.ZOO["test_tiny_llm"],
    ),
}
