"""The LLaMA-style 7B text tower of the large CLIP models, taken from InternVL-C."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models.layers import Linear, boxed, kernel_init
from iv2_jax.models.llm_layers import Decoder, DecoderConfig
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.text.output import TextOutput, embed_ids, pick_token

# What the original wraps when it asks for LoRA (spec stage2 7.2); released files have none.
LORA = LoraConfig(rank=16, alpha=32.0, dropout=0.1)
LORA_TARGETS = ("q", "v")

_LLAMA_7B = DecoderConfig(width=4096, depth=32, num_heads=32, mlp_width=11008, norm_epsilon=1e-6)


@dataclasses.dataclass(frozen=True)
class LlamaClipConfig:
    """Shape and options of `LlamaClipText`; the defaults are those of spec stage2 7.2.

    Attributes:
        vocab_size: rows of the token table.
        decoder: the blocks and the final norm, with adapters if `decoder.lora` is set.
        out_width: size of the text feature.

    Raises:
        ConfigError: a size is not positive; the message names it.
    """

    vocab_size: int = 49954
    decoder: DecoderConfig = _LLAMA_7B
    out_width: int = 768

    def __post_init__(self) -> None:
        for field in ("vocab_size", "out_width"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)}: must be at least 1")

    def with_lora(
        self, lora: LoraConfig = LORA, targets: tuple[str, ...] = LORA_TARGETS
    ) -> LlamaClipConfig:
        """The config with adapters on `targets`."""
        decoder = dataclasses.replace(self.decoder, lora=lora, lora_targets=targets)
        return dataclasses.replace(self, decoder=decoder)

    def without_lora(self) -> LlamaClipConfig:
        """The config that fits merged parameters."""
        decoder = dataclasses.replace(self.decoder, lora=None, lora_targets=())
        return dataclasses.replace(self, decoder=decoder)


class LlamaClipText(nn.Module):
    """Token table, causal decoder, and the projected state of the last real token.

    Attributes:
        config: shape and options.
    """

    config: LlamaClipConfig

    @nn.compact
    def __call__(
        self, ids: jax.Array, *, return_layers: tuple[int, ...] = (), train: bool = False
    ) -> TextOutput:
        """Encodes texts.

        Args:
            ids: int `(B, N)` token ids, padded with 0 on the right. The pooled token is number
                count(ids > 0) - 1, so an id 0 inside a text would shift it (spec stage2 7.2).
            return_layers: blocks whose outputs are returned, ascending; negative numbers count
                from the end.
            train: the adapters' dropout, from the rng stream `dropout`.

        Returns:
            `TextOutput`, C = `config.out_width`.
        """
        c, precision = self.config, self.config.decoder.precision
        width = c.decoder.width
        table = self.param(
            "token_embed",
            boxed(kernel_init, "vocab", "embed"),
            (c.vocab_size, width),
            jnp.dtype(precision.param_dtype),
        )
        real = ids > 0
        # Padding is numbered on, as in the original; what comes out there is never pooled.
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        out = Decoder(c.decoder, name="decoder")(
            embed_ids(table, ids, precision.compute_dtype),
            mask=real,
            positions=positions,
            return_layers=return_layers,
            train=train,
        )
        projection = Linear(
            (width,),
            (c.out_width,),
            ("embed",),
            ("pool",),
            use_bias=False,
            precision=precision,
            name="proj",
        )
        last = jnp.sum(real, axis=1) - 1
        return TextOutput(out.hidden, projection(pick_token(out.hidden, last)), out.features)


ZOO = {
    "llama_clip_7b_text": LlamaClipConfig(),
    "test_tiny_llama_clip": LlamaClipConfig(
        vocab_size=96,
        decoder=DecoderConfig(width=32, depth=2, num_heads=4, mlp_width=48, norm_epsilon=1e-6),
        out_width=24,
    ),
}
