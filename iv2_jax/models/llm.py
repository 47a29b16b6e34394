"""Causal language models of Mistral, LLaMA and InternLM2 type: token embedding, decoder, head.

They take tokens or embeddings (chat puts visual rows among embedded text) and give logits; a
static key-value cache makes decoding one compiled step (spec stage 3, 6). `generate` has the
decoding loops.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from iv2_jax.errors import ConfigError
from iv2_jax.models.kv_cache import KVCache, empty_cache
from iv2_jax.models.layers import Linear, boxed, kernel_init
from iv2_jax.models.llm_layers import Decoder, DecoderConfig, DecoderOutput
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class LlmConfig:
    """A causal language model.

    Attributes:
        vocab_size: tokens of embedding and head.
        decoder: blocks, positions, adapters, dtypes.
        tied_head: the head is the transposed embedding.
        lora_head: the head has an adapter too (of `decoder.lora`), as in Chat-8B.
        context_length: tokens that prompt and answer may have together; `generate` refuses more.
            None for no bound.
    """

    vocab_size: int
    decoder: DecoderConfig
    tied_head: bool = False
    lora_head: bool = False
    context_length: int | None = None

    def __post_init__(self) -> None:
        if self.context_length is not None and self.context_length < 1:
            raise ConfigError(f"context_length={self.context_length} must be at least 1, or None")
        if self.vocab_size < 2:
            raise ConfigError(f"vocab_size={self.vocab_size} must be at least 2")
        if self.lora_head and self.decoder.lora is None:
            raise ConfigError("lora_head=True needs decoder.lora to be set")
        if self.lora_head and self.tied_head:
            raise ConfigError("lora_head=True needs a head of its own: set tied_head=False")

    def without_lora(self) -> LlmConfig:
        """The config that fits merged parameters."""
        decoder = dataclasses.replace(self.decoder, lora=None, lora_targets=())
        return dataclasses.replace(self, decoder=decoder, lora_head=False)

    def with_lora(
        self, lora: LoraConfig, targets: tuple[str, ...] | None = None, *, head: bool = False
    ) -> LlmConfig:
        """The config with adapters on `targets` (None: on all maps of a block)."""
        targets = self.decoder.projections if targets is None else targets
        decoder = dataclasses.replace(self.decoder, lora=lora, lora_targets=targets)
        return dataclasses.replace(self, decoder=decoder, lora_head=head)


@struct.dataclass
class LlmOutput:
    """What an `Llm` returns.

    Attributes:
        logits: float32 `(B, N, vocab_size)`; row n scores the token after token n.
        hidden: `(B, N, width)` after the final norm.
        features: `(K, B, N, width)` residual stream after the asked-for blocks, or None.
        cache: the cache with this pass's tokens in it, or None.
    """

    logits: jax.Array
    hidden: jax.Array
    features: jax.Array | None
    cache: KVCache | None


class Llm(nn.Module):
    """Token embedding, decoder and head."""

    config: LlmConfig

    def setup(self) -> None:
        """Names the parameters `embed/embedding`, `decoder/...` and `head/kernel`."""
        config, decoder = self.config, self.config.decoder
        self.embed = TokenEmbed(config)
        self.decoder = Decoder(decoder)
        if not config.tied_head:
            self.head = Linear(
                (decoder.width,),
                (config.vocab_size,),
                ("embed",),
                ("vocab",),
                use_bias=False,
                precision=decoder.precision,
                lora=decoder.lora if config.lora_head else None,
            )

    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        prefill: bool = False,
        return_layers: tuple[int, ...] = (),
        train: bool = False,
    ) -> LlmOutput:
        """Gives the logits of every position.

        Args:
            tokens: int `(B, N)`, or None if `embeddings` are given.
            embeddings: `(B, N, width)` in the place of embedded tokens.
            mask: see `Decoder`.
            positions: see `Decoder`.
            segment_ids: see `Decoder`.
            cache: see `Decoder`.
            prefill: see `Decoder`.
            return_layers: see `Decoder`.
            train: adapters' dropout, from the rng stream `dropout`.

        Raises:
            ValueError: both or neither of `tokens` and `embeddings` are given.
        """
        if (tokens is None) == (embeddings is None):
            raise ValueError("give either tokens or embeddings")
        if embeddings is None:
            embeddings = self.embed(tokens)
        out = self.hidden(
            embeddings,
            mask=mask,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            prefill=prefill,
            return_layers=return_layers,
            train=train,
        )
        return LlmOutput(self.logits(out.hidden, train), out.hidden, out.features, out.cache)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embeds int `(B, N)` as `(B, N, width)`; an id out of range gives NaN."""
        return self.embed(tokens)

    def hidden(
        self,
        embeddings: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        prefill: bool = False,
        return_layers: tuple[int, ...] = (),
        train: bool = False,
    ) -> DecoderOutput:
        """Runs the decoder alone; arguments as in `Decoder`."""
        return self.decoder(
            embeddings.astype(self.config.decoder.precision.compute_dtype),
            mask=mask,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            prefill=prefill,
            return_layers=return_layers,
            train=train,
        )

    def logits(self, hidden: jax.Array, train: bool = False) -> jax.Array:
        """Maps hidden states `(..., width)` to float32 logits `(..., vocab_size)`."""
        scores = self.embed.attend(hidden) if self.config.tied_head else self.head(hidden, train)
        return scores.astype(jnp.float32)

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """A cache with room for `slots` tokens a row."""
        return empty_cache(self.config.decoder, batch, slots)


class TokenEmbed(nn.Module):
    """Table of token embeddings, read by id or, as a tied head, by product."""

    config: LlmConfig

    def setup(self) -> None:
        """Makes the table `embedding` `(vocab_size, width)`."""
        config = self.config
        self.embedding = self.param(
            "embedding",
            boxed(kernel_init, "vocab", "embed"),
            (config.vocab_size, config.decoder.width),
            jnp.dtype(config.decoder.precision.param_dtype),
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embeds int `(B, N)` as `(B, N, width)`; an id out of range gives NaN."""
        rows = jnp.take(self.embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan)
        return rows.astype(self.config.decoder.precision.compute_dtype)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """Scores `(..., width)` against every row: `(..., vocab_size)`."""
        return hidden @ self.embedding.astype(hidden.dtype).T


_MISTRAL_7B = LlmConfig(
    vocab_size=32768,
    decoder=DecoderConfig(
        width=4096,
        depth=32,
        num_heads=32,
        num_kv_heads=8,
        mlp_width=14336,
        norm_epsilon=1e-5,
        rope=RopeConfig(theta=1e6),
    ),
)

_INTERNLM2_5_7B = LlmConfig(
    vocab_size=92544,
    decoder=dataclasses.replace(
        _MISTRAL_7B.decoder,
        fused_qkv=True,
        rope=RopeConfig(theta=5e7, scaling="dynamic", factor=2.5, base_length=262144),
    ),
)

_LORA = LoraConfig(rank=16, alpha=32.0, dropout=0.1)

# Spec stage 3, 6.1 and 6.4; `_lora` names hold the adapters the chat models are tuned with.
ZOO: dict[str, LlmConfig] = {
    "mistral_7b": _MISTRAL_7B,
    "mistral_7b_v0_2": dataclasses.replace(_MISTRAL_7B, vocab_size=32000),
    "mistral_7b_v0_1": LlmConfig(
        vocab_size=32000,
        decoder=dataclasses.replace(
            _MISTRAL_7B.decoder, rope=RopeConfig(theta=1e4), sliding_window=4096
        ),
    ),
    "mistral_7b_lora": _MISTRAL_7B.with_lora(_LORA, head=True),
    "internlm2_5_7b": _INTERNLM2_5_7B,
    "internlm2_5_7b_lora": _INTERNLM2_5_7B.with_lora(_LORA),
    "vicuna_7b": LlmConfig(
        vocab_size=32000,
        decoder=DecoderConfig(
            width=4096, depth=32, num_heads=32, mlp_width=11008, norm_epsilon=1e-6
        ),
    ),
    "test_tiny_llm": LlmConfig(
        vocab_size=61,
        decoder=DecoderConfig(width=32, depth=2, num_heads=4, num_kv_heads=2, mlp_width=48),
    ),
}
