"""BERT's parts: embeddings, post-norm attention and feed-forward, and the layers made of them.

Every sub-layer is `norm(x + dropout(branch(x)))`. The same parts make the text tower (`bert`) and
the Q-Former, in which the first tokens are queries: they alone read the context and they have a
feed-forward of their own (spec stage2 3, stage3 2.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models.attention import dot_product_attention
from iv2_jax.models.checks import require_rates, require_sizes
from iv2_jax.models.layers import DropPath, LayerNorm, Linear, Precision, boxed, kernel_init
from iv2_jax.models.text.output import embed_ids

# What the original adds to the scores of padded text: far below any score, yet not infinite, so
# that in float32 a padded key is gone and a sentence of nothing but padding still has a softmax.
SELF_MASK_SCORE = -10000.0


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Shape and options of a layer.

    Attributes:
        width: features of a token.
        num_heads: attention heads; divides `width`.
        mlp_width: hidden size of the feed-forward.
        context_width: features of the tokens that cross-attention reads.
        epsilon: of the norms.
        dropout_rate: dropout of the embeddings and of each branch's output.
        attention_dropout_rate: dropout of the attention's weights.
        init_std: standard deviation that kernels start with: 0.02 is BERT's.
        precision: dtypes.

    Raises:
        ConfigError: a value is out of range or does not fit another; the message names it.
    """

    width: int
    num_heads: int
    mlp_width: int
    context_width: int
    epsilon: float = 1e-12
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    init_std: float = 0.02
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self) -> None:
        require_sizes(self, ("width", "num_heads", "mlp_width", "context_width"))
        if self.width % self.num_heads:
            raise ConfigError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        require_rates(self, ("dropout_rate", "attention_dropout_rate"))
        for name in ("epsilon", "init_std"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")

    @classmethod
    def of(cls, config: Any) -> LayerConfig:
        """The layer of a larger config that has these fields among its own; `init_std` if set."""
        names = [field.name for field in dataclasses.fields(cls)]
        optional = ("init_std",)
        return cls(
            **{n: getattr(config, n) for n in names if n not in optional or hasattr(config, n)}
        )

    @property
    def kernel_init(self) -> nn.initializers.Initializer:
        """Initializer of the kernels."""
        return nn.initializers.normal(self.init_std)


def self_attention_bias(mask: jax.Array | None) -> jax.Array | None:
    """Scores added for a mask `(B, L)`, 1 = token, 0 = padding: float32 `(B, 1, 1, L)`."""
    if mask is None:
        return None
    return (1.0 - mask.astype(jnp.float32))[:, None, None] * SELF_MASK_SCORE


def cross_attention_bias(mask: jax.Array | None) -> jax.Array | None:
    """Scores added for a mask `(B, M)` of the context, 1 = token: float32 `(B, 1, 1, M)`."""
    if mask is None:
        return None
    return (1.0 - mask.astype(jnp.float32))[:, None, None] * jnp.finfo(jnp.float32).min


class Embeddings(nn.Module):
    """Word, position and token-type tables and the norm over their sum.

    Attributes:
        config: shape and options.
        vocab_size: rows of the word table; 0 for no text, only queries, and no tables.
        max_length: rows of the position table.
        token_types: rows of the token-type table, of which only the first is used; 0 for none.
    """

    config: LayerConfig
    vocab_size: int
    max_length: int
    token_types: int = 2

    def setup(self) -> None:
        """Makes the tables; `word` is also the output matrix of the masked-LM head."""
        c = self.config
        dtype = jnp.dtype(c.precision.param_dtype)

        def table(name: str, axis: str | None, rows: int) -> jax.Array:
            return self.param(name, boxed(kernel_init, axis, "embed"), (rows, c.width), dtype)

        if self.vocab_size:
            self.word = table("word", "vocab", self.vocab_size)
            self.position = table("position", "tokens", self.max_length)
        if self.token_types:
            self.token_type = table("token_type", None, self.token_types)
        self.norm = LayerNorm(c.width, c.epsilon, precision=c.precision)
        self.dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self,
        ids: jax.Array | None,
        queries: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Embeds token ids, queries or both.

        Args:
            ids: int `(B, L)`; positions count from 0. None for queries alone.
            queries: `(B, Q, width)` put in front, without word, position or type.
            train: turns dropout on (rng stream `dropout`).

        Returns:
            `(B, Q + L, width)`; NaN where an id is outside the vocabulary.

        Raises:
            ConfigError: the text is longer than the position table, nothing is given, or ids are
                given to embeddings without tables.
        """
        if ids is None and queries is None:
            raise ConfigError("embeddings need token ids, queries or both")
        if ids is not None and not self.vocab_size:
            raise ConfigError("vocab_size=0: these embeddings have no tables for token ids")
        dtype = self.config.precision.compute_dtype
        parts = [] if queries is None else [queries.astype(dtype)]
        if ids is not None:
            length = ids.shape[1]
            if length > self.max_length:
                raise ConfigError(
                    f"a text of {length} tokens is longer than max_length={self.max_length}"
                )
            words = embed_ids(self.word, ids, dtype) + self.position[:length].astype(dtype)
            if self.token_types:
                words = words + self.token_type[0].astype(dtype)
            parts.append(words)
        x = self.norm(jnp.concatenate(parts, axis=1))
        return self.dropout(x, deterministic=not train)


@dataclasses.dataclass(frozen=True)
class Versions:
    """Texts that read one context each lie beside each other: true, wrong and corrupted captions.

    Keys and values of a context are then made once, and all texts of a row are queries of one
    attention.

    Attributes:
        count: texts of each row of the context; text v of row b is row `b * count + v`.
        swap: gives each row of an array another row's; the last text of a row reads the keys and
            values that it gives. None: all texts read their own row's.
    """

    count: int
    swap: Callable[[jax.Array], jax.Array] | None = None

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        bias: jax.Array | None,
        drop: Callable[[jax.Array], jax.Array] | None,
    ) -> jax.Array:
        """Attention of `(B * count, L, h, d)` queries to `(B, M, h, d)` keys and values."""
        rows, own = len(k), self.count - (self.swap is not None)
        texts = q.reshape(rows, self.count, *q.shape[1:])
        together = texts[:, :own].reshape(rows, own * q.shape[1], *q.shape[2:])
        mixed = dot_product_attention(together, k, v, bias=bias, dropout=drop)
        mixed = mixed.reshape(rows, own, *q.shape[1:])
        if self.swap is not None:
            bias = None if bias is None else self.swap(bias)
            last = texts[:, own], self.swap(k), self.swap(v)
            other = dot_product_attention(*last, bias=bias, dropout=drop)
            mixed = jnp.concatenate([mixed, other[:, None]], axis=1)
        return mixed.reshape(q.shape)


class PostNormAttention(nn.Module):
    """`norm(x + dropout(attention(x)))`, to the tokens themselves or to a context.

    Attributes:
        config: shape and options.
        cross: keys and values come from the context.
    """

    config: LayerConfig
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        bias: jax.Array | None = None,
        versions: Versions | None = None,
        drop_path: jax.Array | float | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Runs the sub-layer.

        Args:
            x: `(B, N, width)`.
            context: `(B, M, context_width)` if `cross`, else None.
            bias: added to the scores, broadcastable to `(B, heads, N, M)`.
            versions: several rows of `x` read one of `context`, see `Versions`.
            drop_path: probability of dropping the branch of a sample; None turns it off.
            train: turns dropout on (rng stream `dropout`).

        Returns:
            `(B, N, width)`.
        """
        c = self.config
        heads = (c.num_heads, c.width // c.num_heads)

        def project(name: str, tokens: jax.Array, width: int) -> jax.Array:
            """Maps `(B, M, width)` to heads `(B, M, h, d)`."""
            axes = ("embed",), ("heads", "head_dim")
            return _linear(c, name, (width,), heads, *axes)(tokens)

        source, width = (context, c.context_width) if self.cross else (x, c.width)
        q, k, v = project("q", x, c.width), project("k", source, width), project("v", source, width)
        drop = None
        if train and c.attention_dropout_rate:
            drop = nn.Dropout(c.attention_dropout_rate, deterministic=False, name="weights_dropout")
        if versions is None:
            mixed = dot_product_attention(q, k, v, bias=bias, dropout=drop)
        else:
            mixed = versions.attend(q, k, v, bias, drop)
        axes = ("heads", "head_dim"), ("embed",)
        mixed = _linear(c, "proj", heads, (c.width,), *axes)(mixed)
        return _close(c, x, mixed, drop_path, train)


class FeedForward(nn.Module):
    """`norm(x + dropout(linear(gelu(linear(x)))))` with the exact GELU.

    Attributes:
        config: shape and options.
    """

    config: LayerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        drop_path: jax.Array | float | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Maps `(B, N, width)` to `(B, N, width)`; arguments as in `PostNormAttention`."""
        c = self.config
        inner, outer = ((c.width,), ("embed",)), ((c.mlp_width,), ("mlp",))
        shapes = inner[0], outer[0], inner[1], outer[1]
        hidden = _linear(c, "fc1", *shapes)(x)
        hidden = jax.nn.gelu(hidden, approximate=False)
        shapes = outer[0], inner[0], outer[1], inner[1]
        hidden = _linear(c, "fc2", *shapes)(hidden)
        return _close(c, x, hidden, drop_path, train)


def _linear(config: LayerConfig, name: str, *shapes_and_axes: tuple[Any, ...]) -> Linear:
    """A linear map of a layer."""
    return Linear(
        *shapes_and_axes, precision=config.precision, kernel_init=config.kernel_init, name=name
    )


def _close(
    config: LayerConfig,
    x: jax.Array,
    branch: jax.Array,
    drop_path: jax.Array | float | None,
    train: bool,
) -> jax.Array:
    """Adds a branch to its input and normalises; makes the calling module's last layers."""
    branch = nn.Dropout(config.dropout_rate, name="dropout")(branch, deterministic=not train)
    branch = DropPath(name="drop_path")(branch, drop_path)
    return LayerNorm(config.width, config.epsilon, precision=config.precision, name="norm")(
        x + branch
    )


class Layer(nn.Module):
    """Self-attention, optional cross-attention, feed-forward.

    Attributes:
        config: shape and options.
        cross_attention: has cross-attention, after self-attention.
        query_mlp: the first tokens are queries: only they cross-attend, and they have a
            feed-forward of their own, `mlp_query`, instead of the text's, `mlp`.
        text_mlp: has `mlp`; with `query_mlp` and without it there are queries alone.
    """

    config: LayerConfig
    cross_attention: bool = False
    query_mlp: bool = False
    text_mlp: bool = True

    def setup(self) -> None:
        """Makes the sub-layers."""
        self.attn = PostNormAttention(self.config)
        if self.cross_attention:
            self.cross_attn = PostNormAttention(self.config, cross=True)
        if self.text_mlp:
            self.mlp = FeedForward(self.config)
        if self.query_mlp:
            self.mlp_query = FeedForward(self.config)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        context: jax.Array | None = None,
        context_bias: jax.Array | None = None,
        *,
        versions: Versions | None = None,
        num_queries: int = 0,
        drop_path: jax.Array | float | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Runs the layer.

        Args:
            x: `(B, N, width)`.
            bias: added to the scores of self-attention, see `self_attention_bias`.
            context: `(B, M, context_width)`; None leaves cross-attention out, for text alone.
            context_bias: added to the scores of cross-attention, see `cross_attention_bias`.
            versions: several rows of `x` read one of `context`, see `Versions`.
            num_queries: with `query_mlp`, how many of the first tokens are queries.
            drop_path: probability of dropping a branch of a sample, drawn for each branch (rng
                stream `droppath`); None turns it off.
            train: turns dropout on (rng stream `dropout`).

        Returns:
            `(B, N, width)`.

        Raises:
            ConfigError: queries have no context to read.
        """
        if self.cross_attention and context is None and (self.query_mlp or self.is_initializing()):
            raise ConfigError("a layer with cross-attention needs context tokens")
        reads = self.cross_attention and context is not None
        common = {"drop_path": drop_path, "train": train}
        x = self.attn(x, bias=bias, **common)
        if not self.query_mlp:
            if reads:
                x = self.cross_attn(x, context, bias=context_bias, versions=versions, **common)
            return self.mlp(x, **common)
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if self.cross_attention:
            read = {"bias": context_bias, "versions": versions}
            queries = self.cross_attn(queries, context, **read, **common)
        queries = self.mlp_query(queries, **common)
        if not self.text_mlp:
            return queries
        # Without text this has no rows: it costs nothing and keeps the parameters in the tree.
        text = self.mlp(text, **common)
        return jnp.concatenate([queries, text], axis=1)
