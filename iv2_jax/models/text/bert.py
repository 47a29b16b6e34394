"""BERT used twice: its first layers read text, its last ones fuse the text with a context.

Source: spec stage2 section 3. Nothing is causal and there is no pooler; the text feature is the
hidden state of the first token after the text layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models.block_stack import resolve_layers, scan_blocks
from iv2_jax.models.checks import require_remat, require_sizes
from iv2_jax.models.layers import LayerNorm, Linear, Precision, boxed
from iv2_jax.models.text.bert_layers import (
    Embeddings,
    Layer,
    LayerConfig,
    Versions,
    cross_attention_bias,
    self_attention_bias,
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape and options of a `Bert`; the defaults are BERT-large's.

    Attributes:
        context_width: features of the tokens that the fusion layers read.
        width: features of a token.
        depth: layers, text and fusion ones together.
        fusion_layer: number of text layers; the others, from this one on, are fusion layers with
            cross-attention. Equal to `depth` there are none, and no context is ever read.
        num_heads: attention heads.
        mlp_width: hidden size of the feed-forward.
        vocab_size: rows of the word table.
        max_length: rows of the position table.
        token_types: rows of the token-type table; the model uses the first alone.
        mlm_head: has a masked-LM head. The original has it in pretraining and drops it for
            retrieval and question answering, where its parameters also lose the prefix `bert.`.
        epsilon: of the norms.
        dropout_rate: dropout of embeddings and branches, in training.
        attention_dropout_rate: dropout of the attention's weights, in training.
        remat: what the backward pass recomputes: 'none', 'dots' or 'full'.
        scan_unroll: layers in one iteration of a scan.
        precision: dtypes.

    Raises:
        ConfigError: a value is out of range or does not fit another; the message names it.
    """

    context_width: int = 1408
    width: int = 1024
    depth: int = 24
    fusion_layer: int = 19
    num_heads: int = 16
    mlp_width: int = 4096
    vocab_size: int = 30522
    max_length: int = 512
    token_types: int = 2
    mlm_head: bool = True
    epsilon: float = 1e-12
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    remat: str = "none"
    scan_unroll: int = 1
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self) -> None:
        sizes = ("depth", "fusion_layer", "vocab_size", "max_length", "token_types", "scan_unroll")
        require_sizes(self, sizes)
        if self.fusion_layer > self.depth:
            raise ConfigError(
                f"fusion_layer={self.fusion_layer} is more than depth={self.depth}; equal to it "
                "there are no fusion layers"
            )
        require_remat(self)
        self.layer  # noqa: B018 (checks the fields it is made of)

    @property
    def layer(self) -> LayerConfig:
        """Config of one layer."""
        return LayerConfig.of(self)

    @property
    def num_fusion_layers(self) -> int:
        """Layers with cross-attention."""
        return self.depth - self.fusion_layer


ZOO: dict[str, BertConfig] = {
    "bert_large_stage2_1b": BertConfig(context_width=1408),
    "bert_large_stage2_6b": BertConfig(context_width=768),
    # For tests: both kinds of layers and the head.
    "test_tiny_bert": BertConfig(
        context_width=24,
        width=32,
        depth=3,
        fusion_layer=2,
        num_heads=2,
        mlp_width=48,
        vocab_size=64,
        max_length=16,
    ),
}


class MaskedLMHead(nn.Module):
    """Linear, exact GELU, norm, and the word table as output matrix.

    Attributes:
        config: of the model: its `width`, `vocab_size`, `epsilon` and `precision` (the Q-Former's
            pretraining has this head, too).
    """

    config: Any

    @nn.compact
    def __call__(self, hidden: jax.Array, word: jax.Array) -> jax.Array:
        """Scores every word at every place.

        Args:
            hidden: `(..., width)` hidden states.
            word: `(vocab_size, width)` word table, shared with the embeddings.

        Returns:
            `(..., vocab_size)` logits, float32.
        """
        c = self.config
        # Not split by output: in a loop or a branch, as the losses run this head in, XLA's
        # partitioner (jax 0.10.2) loses part of the gradients of a norm over what `tensor` splits.
        axes = ("embed",), (None,)
        x = Linear((c.width,), (c.width,), *axes, precision=c.precision, name="fc")(hidden)
        x = jax.nn.gelu(x, approximate=False)
        x = LayerNorm(c.width, c.epsilon, precision=c.precision, name="norm")(x)
        bias = self.param(
            "bias",
            boxed(nn.initializers.zeros_init(), "vocab"),
            (c.vocab_size,),
            jnp.dtype(c.precision.param_dtype),
        )
        logits = jnp.matmul(x, word.astype(x.dtype).T, preferred_element_type=jnp.float32)
        return logits + bias.astype(jnp.float32)


class Bert(nn.Module):
    """Text layers, fusion layers and a masked-LM head on one word table.

    The original's modes are methods: `encode_text` is "text" (also "temporal"), `fuse` is
    "fusion" and a plain call is "multi_modal", the one after the other.

    Attributes:
        config: shape and options.
    """

    config: BertConfig

    def setup(self) -> None:
        """Makes the parts; a stack's parameters have a leading axis `layers`."""
        c = self.config
        self.embeddings = Embeddings(c.layer, c.vocab_size, c.max_length, c.token_types)
        self.text_layers = Layer(c.layer)
        if c.num_fusion_layers:
            self.fusion_layers = Layer(c.layer, cross_attention=True)
        if c.mlm_head:
            self.head = MaskedLMHead(c)

    def encode_text(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        *,
        return_layers: tuple[int, ...] = (),
        train: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Embeds the text and runs the text layers.

        Args:
            ids: int `(B, L)` token ids.
            mask: `(B, L)`, 1 = token, 0 = padding; None for no padding.
            return_layers: text layers whose outputs are returned too, ascending; negative numbers
                count from the last text layer.
            train: turns dropout on (rng stream `dropout`).

        Returns:
            `(B, L, width)`, whose first token is the pooled text feature; with `return_layers`
            also `(K, B, L, width)`.

        Raises:
            ConfigError: the text is too long for the position table, or a layer is unknown.
        """
        c = self.config
        hidden, features = self._run(
            self.text_layers,
            self.embeddings(ids, train=train),
            (self_attention_bias(mask),),
            depth=c.fusion_layer,
            return_layers=resolve_layers(return_layers, c.fusion_layer, "return_layers"),
            train=train,
        )
        return hidden if features is None else (hidden, features)

    def fuse(
        self,
        hidden: jax.Array,
        mask: jax.Array | None,
        context: jax.Array | None,
        context_mask: jax.Array | None = None,
        *,
        versions: Versions | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Runs the fusion layers on what `encode_text` gave.

        Args:
            hidden: `(B, L, width)`.
            mask: `(B, L)` mask of the text, as for `encode_text`.
            context: `(B, M, context_width)` video or audio tokens; None for text alone, which
                leaves cross-attention out.
            context_mask: `(B, M)`, 1 = token; None for all (what the original always does).
            versions: several texts read one context: B of `hidden` is then that of `context` times
                `versions.count`.
            train: turns dropout on (rng stream `dropout`).

        Returns:
            `(B, L, width)`; the matching heads read the first token, `mlm_logits` all.

        Raises:
            ConfigError: the model has no fusion layers, or the context has another width.
        """
        c = self.config
        if not c.num_fusion_layers:
            raise ConfigError(
                f"fusion_layer={c.fusion_layer} equals depth: this model has no fusion layers"
            )
        if context is not None and (context.ndim != 3 or context.shape[-1] != c.context_width):
            raise ConfigError(
                f"context has shape {tuple(context.shape)}; context_width={c.context_width} "
                f"needs (B, M, {c.context_width})"
            )
        biases = self_attention_bias(mask), cross_attention_bias(context_mask)
        return self._run(
            self.fusion_layers,
            hidden.astype(c.precision.compute_dtype),
            (biases[0], context, biases[1]),
            versions=versions,
            depth=c.num_fusion_layers,
            train=train,
        )[0]

    def mlm_logits(self, hidden: jax.Array) -> jax.Array:
        """Logits `(..., vocab_size)`, float32, of hidden states `(..., width)`.

        Raises:
            ConfigError: the model was made without its masked-LM head.
        """
        if not self.config.mlm_head:
            raise ConfigError("mlm_head=False: this model has no masked-LM head")
        return self.head(hidden, self.embeddings.word)

    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Runs all layers: `encode_text`, then `fuse` if there are fusion layers.

        Args:
            ids: int `(B, L)` token ids.
            mask: `(B, L)`, 1 = token, 0 = padding; None for no padding.
            context: `(B, M, context_width)`, needed if there are fusion layers.
            context_mask: `(B, M)`, 1 = token; None for all.
            train: turns dropout on (rng stream `dropout`).

        Returns:
            `(B, L, width)`.

        Raises:
            ConfigError: the text is too long, or the context is missing or of another width.
        """
        hidden = self.encode_text(ids, mask, train=train)
        if self.config.num_fusion_layers:
            if context is None:
                raise ConfigError("fusion layers need a context; for text alone use encode_text")
            hidden = self.fuse(hidden, mask, context, context_mask, train=train)
        if self.is_initializing() and self.config.mlm_head:
            self.mlm_logits(hidden)
        return hidden

    def _run(
        self,
        layer: Layer,
        hidden: jax.Array,
        inputs: tuple[jax.Array | None, ...],
        *,
        depth: int,
        versions: Versions | None = None,
        return_layers: tuple[int, ...] = (),
        train: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Scans a stack of layers that all get the same masks and context."""

        def call(mdl: Layer, x: jax.Array, index: jax.Array, rate: None) -> jax.Array:
            return mdl(x, *inputs, versions=versions, train=train)

        return scan_blocks(
            layer,
            hidden,
            depth=depth,
            return_layers=return_layers,
            remat=self.config.remat,
            unroll=self.config.scan_unroll,
            call=call,
            train=train,
        )
