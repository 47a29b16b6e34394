"""The bridge from the video encoder to a language model: a Q-Former and a projection.

Learned queries read the video's tokens by cross-attention in every second layer of a BERT, whose
self-attention they share with the text of the task, if there is one; the queries' outputs,
projected to the language model's width, stand in its input as visual tokens (spec stage3 2).
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models.block_stack import scan_blocks
from iv2_jax.models.checks import require_rates, require_remat, require_sizes
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
class BridgeConfig:
    """Shape and options of a `Bridge`; the defaults are InternVideo2-Chat-8B's.

    Attributes:
        context_width: features of a token of the video encoder.
        llm_width: features of a token of the language model.
        num_queries: queries of the pretrained Q-Former.
        num_extra_queries: queries added for instruction tuning.
        text: the Q-Former can read text. Without it, it has neither tables for words and positions
            nor feed-forward parts for text (VideoChat2's caption alignment).
        width: features of a query.
        depth: layers.
        num_heads: attention heads.
        mlp_width: hidden size of a feed-forward.
        cross_every: layers 0, n, 2n, ... have cross-attention.
        vocab_size: rows of the word table.
        max_length: rows of the position table.
        project_down: carries the map from the language model's width back to the Q-Former's. No
            released model applies it, but InternVideo2-Chat's files hold it (spec stage3 2.3).
        zero_extra_queries: starts the extra queries at zero, as the original does: all equal, and
            told apart by dropout alone. Otherwise they are drawn like the others (spec stage3 2.2).
        epsilon: of the norms.
        init_std: standard deviation that the layers' kernels start with: BERT's 0.02 is for widths
            like BERT's. A narrow bridge needs about one over the square root of its width, or its
            visual tokens hardly depend on the video at first.
        dropout_rate: dropout of embeddings and branches, in training.
        attention_dropout_rate: dropout of the attention's weights, in training.
        drop_path_rate: DropPath probability of the last layer's branches, growing linearly from 0.
        remat: what the backward pass recomputes: 'none', 'dots' or 'full'.
        scan_unroll: groups of `cross_every` layers in one iteration of the scan.
        precision: dtypes.

    Raises:
        ConfigError: a value is out of range or does not fit another; the message names it.
    """

    context_width: int = 1408
    llm_width: int = 4096
    num_queries: int = 32
    num_extra_queries: int = 64
    text: bool = True
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    cross_every: int = 2
    vocab_size: int = 30523
    max_length: int = 512
    project_down: bool = False
    zero_extra_queries: bool = False
    epsilon: float = 1e-12
    init_std: float = 0.02
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    drop_path_rate: float = 0.2
    remat: str = "none"
    scan_unroll: int = 1
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self) -> None:
        sizes = ("llm_width", "num_queries", "depth", "cross_every", "scan_unroll")
        require_sizes(self, sizes + (("vocab_size", "max_length") if self.text else ()))
        if self.num_extra_queries < 0:
            raise ConfigError(f"num_extra_queries={self.num_extra_queries}: must not be negative")
        require_rates(self, ("drop_path_rate",))
        require_remat(self)
        self.layer  # noqa: B018 (checks the fields it is made of)

    @property
    def layer(self) -> LayerConfig:
        """Config of one layer."""
        return LayerConfig.of(self)

    @property
    def num_tokens(self) -> int:
        """Visual tokens of a view."""
        return self.num_queries + self.num_extra_queries

    @property
    def num_groups(self) -> int:
        """Whole groups of `cross_every` layers, which are scanned."""
        return self.depth // self.cross_every

    @property
    def num_tail_layers(self) -> int:
        """Layers left over after the whole groups."""
        return self.depth % self.cross_every


@flax.struct.dataclass
class BridgeOutput:
    """What the bridge gives.

    Attributes:
        tokens: `(B, K, llm_width)` visual tokens; K queries.
        hidden: `(B, K + L, width)` outputs of the Q-Former, those of the text after the queries'.
    """

    tokens: jax.Array
    hidden: jax.Array


class LayerGroup(nn.Module):
    """A layer with cross-attention and the ones without that follow it.

    Attributes:
        config: shape and options of the bridge.
        size: layers.
    """

    config: BridgeConfig
    size: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array | None,
        context: jax.Array,
        context_bias: jax.Array | None,
        *,
        versions: Versions | None = None,
        drop_path: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Runs the layers; arguments as in `Layer`, with `drop_path` `(size,)`, one for each."""
        c = self.config
        for index in range(self.size):
            x = Layer(
                c.layer,
                cross_attention=index == 0,
                query_mlp=True,
                text_mlp=c.text,
                name=f"layer_{index}",
            )(
                x,
                bias,
                context,
                context_bias,
                versions=versions,
                num_queries=c.num_tokens,
                drop_path=None if drop_path is None else drop_path[index],
                train=train,
            )
        return x


class Bridge(nn.Module):
    """Norm of the video's tokens, Q-Former and projection.

    Attributes:
        config: shape and options.
    """

    config: BridgeConfig

    def setup(self) -> None:
        """Makes the parts; `groups` has a leading axis `layers`, `tail` has none."""
        c = self.config
        dtype = jnp.dtype(c.precision.param_dtype)
        normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros_init()

        def queries(name: str, count: int, init: nn.initializers.Initializer) -> jax.Array:
            init = boxed(init, None, "tokens", "embed")
            return self.param(name, init, (1, count, c.width), dtype)[0]

        parts = [queries("query_tokens", c.num_queries, normal)]
        if c.num_extra_queries:
            init = zeros if c.zero_extra_queries else normal
            parts.append(queries("extra_query_tokens", c.num_extra_queries, init))
        self.queries = jnp.concatenate(parts)
        self.vision_norm = LayerNorm(c.context_width, c.epsilon, precision=c.precision)
        self.embeddings = Embeddings(
            c.layer, c.vocab_size if c.text else 0, c.max_length, token_types=0
        )
        if c.num_groups:
            self.groups = LayerGroup(c, c.cross_every)
        if c.num_tail_layers:
            self.tail = LayerGroup(c, c.num_tail_layers)
        narrow, wide = ((c.width,), ("embed",)), ((c.llm_width,), ("mlp",))
        self.project_up = Linear(narrow[0], wide[0], narrow[1], wide[1], precision=c.precision)
        if c.project_down:
            self.project_down = Linear(
                wide[0], narrow[0], wide[1], narrow[1], precision=c.precision
            )

    def __call__(
        self,
        context: jax.Array,
        ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        context_mask: jax.Array | None = None,
        train: bool = False,
    ) -> BridgeOutput:
        """Turns the video's tokens into visual tokens of the language model.

        Args:
            context: `(B, M, context_width)` tokens of the video encoder, not normalised.
            ids: int `(B, L)` text for the Q-Former; None for none, which is not the same as an
                empty one. Padded on the left, as the original pads, its positions shift.
            mask: `(B, L)`, 1 = token, 0 = padding; None for no padding.
            context_mask: `(B, M)`, 1 = token; None for all.
            train: turns dropout and DropPath on (rng streams `dropout` and `droppath`).

        Returns:
            `BridgeOutput`.

        Raises:
            ConfigError: the context has another width, the text is too long, or there is text for
                a bridge without.
        """
        c = self.config
        if ids is not None and not c.text:
            raise ConfigError("text=False: this bridge reads no text; give it no ids")
        x = self.embed(len(context), ids, train=train)
        bias = None
        if ids is not None and mask is not None:
            seen = jnp.ones((len(context), c.num_tokens), jnp.float32)
            bias = self_attention_bias(jnp.concatenate([seen, mask], axis=1))
        x = self.hidden(x, context, bias, context_mask=context_mask, train=train)
        tokens = self.project_up(x[:, : c.num_tokens])
        if self.is_initializing() and c.project_down:
            self.project_down(tokens)
        return BridgeOutput(tokens, x)

    def embed(self, batch: int, ids: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """What enters the first layer, `(batch, K + L, width)`; arguments as in the call."""
        queries = jnp.broadcast_to(self.queries, (batch, *self.queries.shape))
        return self.embeddings(ids, queries, train=train)

    def embed_text(self, ids: jax.Array, *, train: bool = False) -> jax.Array:
        """What enters the first layer of a text alone, `(B, L, width)`; positions from 0 on."""
        return self.embeddings(ids, train=train)

    def hidden(
        self,
        x: jax.Array,
        context: jax.Array,
        bias: jax.Array | None = None,
        *,
        context_mask: jax.Array | None = None,
        versions: Versions | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Runs the Q-Former, without the projection, on what was embedded.

        Args:
            x: `(B, N, width)` of `embed`, and of `embed_text` behind it: the queries are first.
            context: as in the call, with one row for each row of `x`, or fewer with `versions`.
            bias: added to the scores of self-attention, broadcastable to `(B, heads, N, N)`; says
                which tokens see each other. None: all do.
            context_mask: as in the call.
            versions: several rows of `x` read one of `context`, see `Versions`.
            train: as in the call.

        Returns:
            `(B, N, width)`.

        Raises:
            ConfigError: the context has another width.
        """
        c = self.config
        if context.ndim != 3 or context.shape[-1] != c.context_width:
            raise ConfigError(
                f"context has shape {tuple(context.shape)}; context_width={c.context_width} "
                f"needs (B, M, {c.context_width})"
            )
        inputs = bias, self.vision_norm(context), cross_attention_bias(context_mask)
        return self._run(x, inputs, versions, train)

    def _run(
        self,
        x: jax.Array,
        inputs: tuple[jax.Array | None, ...],
        versions: Versions | None,
        train: bool,
    ) -> jax.Array:
        """Runs all layers, which get the same masks and context."""
        c = self.config

        def call(mdl: LayerGroup, x: jax.Array, group: jax.Array, _: None) -> jax.Array:
            """Runs a group with its share of the rates."""
            rates = drop_path_rates(c, group, mdl.size) if train and c.drop_path_rate else None
            return mdl(x, *inputs, versions=versions, drop_path=rates, train=train)

        if c.num_groups:
            x, _ = scan_blocks(
                self.groups,
                x,
                depth=c.num_groups,
                remat=c.remat,
                unroll=c.scan_unroll,
                call=call,
                train=train,
            )
        return call(self.tail, x, jnp.int32(c.num_groups), None) if c.num_tail_layers else x


def drop_path_rates(config: BridgeConfig, group: jax.Array | int, size: int) -> jax.Array:
    """DropPath probabilities `(size,)` of the first layers of a group; the tail is the last."""
    rates = np.linspace(0.0, config.drop_path_rate, config.depth, dtype=np.float32)
    return jax.lax.dynamic_slice(jnp.asarray(rates), (group * config.cross_every,), (size,))


ZOO: dict[str, BridgeConfig] = {
    "bridge_internvideo2_chat": BridgeConfig(project_down=True),
    # VideoChat2's: UMT-L in front, the text side only from instruction tuning on.
    "bridge_videochat2": BridgeConfig(context_width=1024),
    "bridge_videochat2_align": BridgeConfig(context_width=1024, text=False),
    # For tests: both kinds of layers, a group and a tail.
    "test_tiny_bridge": BridgeConfig(
        context_width=24,
        llm_width=32,
        num_queries=3,
        num_extra_queries=2,
        width=16,
        depth=3,
        num_heads=2,
        mlp_width=20,
        vocab_size=40,
        max_length=8,
        project_down=True,
    ),
}
