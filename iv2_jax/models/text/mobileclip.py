"""The MobileCLIP-B text tower: a small pre-norm transformer, causal or bidirectional."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models.attention import dot_product_attention
from iv2_jax.models.block_stack import resolve_layers, scan_blocks
from iv2_jax.models.checks import require_remat
from iv2_jax.models.layers import LayerNorm, Linear, Mlp, Precision, boxed, kernel_init
from iv2_jax.models.positions import linear_weights
from iv2_jax.models.text.output import TextOutput, embed_ids, pick_token


@dataclasses.dataclass(frozen=True)
class MobileClipConfig:
    """Shape and options of `MobileClipText`; the defaults are MobileCLIP-B's (spec stage2 7.3).

    Attributes:
        vocab_size: rows of the token table.
        context_length: rows of the position table; texts of another length get a resized one.
        width: features of a token.
        mlp_widths: hidden size of each block's MLP; their number is the depth.
        num_heads: attention heads of each block.
        out_width: size of the text feature.
        causal: a token attends to itself and those before it, instead of to all.
        remat: what the backward pass recomputes: 'none', 'dots' or 'full'.
        scan_unroll: blocks in one iteration of the scan over depth.
        precision: dtypes.

    Raises:
        ConfigError: a value is out of range or does not fit another; the message names both.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    mlp_widths: tuple[int, ...] = (2048,) * 12
    num_heads: tuple[int, ...] = (8,) * 12
    out_width: int = 512
    causal: bool = True
    remat: str = "none"
    scan_unroll: int = 1
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self) -> None:
        for field in ("vocab_size", "context_length", "width", "out_width", "scan_unroll"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)}: must be at least 1")
        if not self.mlp_widths or min(self.mlp_widths) < 1:
            raise ConfigError(f"mlp_widths={self.mlp_widths}: one positive size a block is needed")
        if len(self.num_heads) != len(self.mlp_widths):
            raise ConfigError(
                f"num_heads={self.num_heads} names {len(self.num_heads)} blocks, "
                f"mlp_widths {len(self.mlp_widths)}"
            )
        bad = [heads for heads in self.num_heads if heads < 1 or self.width % heads]
        if bad:
            raise ConfigError(f"num_heads: width={self.width} is not a multiple of {bad[0]}")
        require_remat(self)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.mlp_widths)

    @property
    def stacks(self) -> tuple[tuple[str, int, int], ...]:
        """Runs of equal blocks, as (name of the parameters, first block, number of blocks).

        Blocks of one shape are scanned, their parameters stacked under `blocks`; where shapes
        change along the depth, each run has its own stack `blocks_0`, `blocks_1`, ...
        """
        shapes = zip(self.mlp_widths, self.num_heads, strict=True)
        lengths = [len(list(run)) for _, run in itertools.groupby(shapes)]
        starts = itertools.accumulate(lengths, initial=0)
        names = ["blocks"] if len(lengths) == 1 else [f"blocks_{i}" for i in range(len(lengths))]
        return tuple(zip(names, starts, lengths, strict=False))


class _SelfAttention(nn.Module):
    """Multi-head self-attention with biases, over the past or over all tokens."""

    config: MobileClipConfig
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, N, width)` to `(B, N, width)`."""
        c, heads = self.config, (self.num_heads, self.config.width // self.num_heads)
        by_head = ("heads", "head_dim")
        common = {"precision": c.precision}
        out = (3, *heads), ("embed",), (None, *by_head)
        qkv = Linear((c.width,), *out, name="qkv", **common)(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        mixed = dot_product_attention(q, k, v, causal=c.causal)
        return Linear(heads, (c.width,), by_head, ("embed",), name="proj", **common)(mixed)


class _Block(nn.Module):
    """Pre-norm residual block."""

    config: MobileClipConfig
    mlp_width: int
    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, N, width)` to `(B, N, width)`."""
        c = self.config
        branch = LayerNorm(c.width, precision=c.precision, name="norm1")(x)
        x = x + _SelfAttention(c, self.num_heads, name="attn")(branch)
        branch = LayerNorm(c.width, precision=c.precision, name="norm2")(x)
        return x + Mlp(c.width, self.mlp_width, tanh_gelu=False, precision=c.precision, name="mlp")(
            branch
        )


class MobileClipText(nn.Module):
    """Token and position tables, blocks, final norm, and the end token's projected feature.

    No padding mask is ever applied: the original has none, so padding takes part in bidirectional
    attention (goldens README fact 14).

    Attributes:
        config: shape and options.
    """

    config: MobileClipConfig

    @nn.compact
    def __call__(
        self, ids: jax.Array, *, return_layers: tuple[int, ...] = (), train: bool = False
    ) -> TextOutput:
        """Encodes texts.

        Args:
            ids: int `(B, N)` token ids. The pooled token is the first with the largest id, which
                is the end token's in the tokenizer's vocabulary.
            return_layers: blocks whose outputs are returned, ascending; negative numbers count
                from the end.
            train: without effect: the original has no dropout here.

        Returns:
            `TextOutput`, C = `config.out_width`.
        """
        del train
        c = self.config
        dtype, param_dtype = c.precision.compute_dtype, jnp.dtype(c.precision.param_dtype)
        table = self.param(
            "token_embed",
            boxed(kernel_init, "vocab", "embed"),
            (c.vocab_size, c.width),
            param_dtype,
        )
        positions = self.param(
            "pos_embed",
            boxed(kernel_init, None, None, "tokens", "embed"),
            (1, 1, c.context_length, c.width),
            param_dtype,
        )[0, 0]
        if ids.shape[1] != c.context_length:
            weights = linear_weights(c.context_length, ids.shape[1]).astype(positions.dtype)
            positions = jnp.matmul(weights, positions)
        x = embed_ids(table, ids, dtype) + positions.astype(dtype)
        x, features = self._run_blocks(x, resolve_layers(return_layers, c.depth, "return_layers"))
        x = LayerNorm(c.width, precision=c.precision, name="final_norm")(x)
        projection = Linear(
            (c.width,),
            (c.out_width,),
            ("embed",),
            ("pool",),
            use_bias=False,
            precision=c.precision,
            name="proj",
        )
        return TextOutput(x, projection(pick_token(x, jnp.argmax(ids, axis=1))), features)

    def _run_blocks(
        self, x: jax.Array, return_layers: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs the stacks one after another and joins the features each of them collects."""
        c, collected = self.config, []
        for name, start, length in c.stacks:
            wanted = tuple(i - start for i in return_layers if start <= i < start + length)
            x, features = scan_blocks(
                _Block(c, c.mlp_widths[start], c.num_heads[start], name=name),
                x,
                depth=length,
                return_layers=wanted,
                remat=c.remat,
                unroll=c.scan_unroll,
                call=lambda block, x, layer, drop_rate: block(x),
            )
            if features is not None:
                collected.append(features)
        return x, jnp.concatenate(collected) if collected else None


ZOO = {
    "mobileclip_b_text": MobileClipConfig(),
    "test_tiny_mobileclip": MobileClipConfig(
        vocab_size=96,
        context_length=12,
        width=32,
        mlp_widths=(64, 48),
        num_heads=(2, 2),
        out_width=24,
    ),
}
