"""Decoder blocks of Mistral, LLaMA and InternLM2 type, scanned, with a static key-value cache.

One block serves the chat models and the LLaMA-style text tower: RMSNorm in front, rotary
positions, grouped-query attention with an optional sliding window, gated SiLU MLP, no biases
(spec stage 3, 6.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models.attention import dot_product_attention
from iv2_jax.models.block_stack import REMAT_POLICIES, resolve_layers
from iv2_jax.models.kv_cache import KVCache, positions_of
from iv2_jax.models.layers import Linear, Precision, RMSNorm
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.rope import RopeConfig, rotate, rotation


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A stack of decoder blocks with the final norm.

    Attributes:
        width: size of a token.
        depth: number of blocks.
        num_heads: query heads.
        mlp_width: hidden size of the gated MLP.
        num_kv_heads: key and value heads, a divisor of `num_heads`; None for `num_heads`.
        head_dim: size of a head; None for `width / num_heads`.
        norm_epsilon: of every RMSNorm.
        rope: rotary positions.
        sliding_window: a token sees itself and the `sliding_window - 1` before it; None for all.
        fused_qkv: one map makes queries, keys and values, as in InternLM2. It matters for LoRA
            alone, whose rank is then shared by the three.
        lora: adapters' config; None for none.
        lora_targets: maps that get one: 'q', 'k', 'v' (or 'qkv' if fused), 'o', 'gate', 'up',
            'down'.
        remat: what the backward pass recomputes in a block: 'none', 'dots' or 'full'.
        scan_unroll: blocks in one loop iteration.
        precision: dtypes.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm_epsilon: float = 1e-5
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    sliding_window: int | None = None
    fused_qkv: bool = False
    lora: LoraConfig | None = None
    lora_targets: tuple[str, ...] = ()
    remat: Literal["none", "dots", "full"] = "none"
    scan_unroll: int = 1
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self) -> None:
        for field in ("width", "depth", "num_heads", "mlp_width", "scan_unroll"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field}={getattr(self, field)} must be at least 1")
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.head_dim is None:
            if self.width % self.num_heads:
                raise ConfigError(
                    f"width={self.width} is no multiple of num_heads={self.num_heads}; "
                    "give head_dim"
                )
            object.__setattr__(self, "head_dim", self.width // self.num_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even: positions rotate pairs")
        if self.rope.scaling == "dynamic" and self.head_dim < 4:
            raise ConfigError("head_dim must be at least 4 with rope.scaling='dynamic'")
        if self.rope.divisors and len(self.rope.divisors) != self.head_dim // 2:
            raise ConfigError(
                f"rope.divisors has {len(self.rope.divisors)} numbers, heads of {self.head_dim} "
                f"need {self.head_dim // 2}"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window={self.sliding_window} must be at least 1, or None")
        if self.remat not in REMAT_POLICIES:
            raise ConfigError(f"remat={self.remat!r}{nearest(str(self.remat), REMAT_POLICIES)}")
        unknown = [name for name in self.lora_targets if name not in self.projections]
        if unknown:
            raise ConfigError(
                f"lora_targets: no map {unknown[0]!r}{nearest(unknown[0], self.projections)}"
            )
        if self.lora_targets and self.lora is None:
            raise ConfigError(f"lora_targets={self.lora_targets} needs lora to be set")

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of a block's linear maps."""
        inner = ("qkv",) if self.fused_qkv else ("q", "k", "v")
        return (*inner, "o", "gate", "up", "down")

    def adapter(self, name: str) -> LoraConfig | None:
        """The adapter of one of a block's linear maps, or None."""
        return self.lora if name in self.lora_targets else None


@struct.dataclass
class Context:
    """What all blocks of one pass share.

    Attributes:
        cos: cosines of the rotary angles.
        sin: sines.
        mask: bool, broadcastable to `(B, heads, N, M)`, or None.
        segments: int `(B, N)` numbers of the samples of a packed row, or None.
        slot: first slot of the cache to write, or None without a cache.
        causal: token i sees tokens 0..i of this pass.
        read_cache: attend to the whole cache, not only to the tokens of this pass.
        train: dropout of adapters is active.
    """

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array | None
    segments: jax.Array | None
    slot: jax.Array | None
    causal: bool = struct.field(pytree_node=False)
    read_cache: bool = struct.field(pytree_node=False)
    train: bool = struct.field(pytree_node=False)


Store = tuple[jax.Array, jax.Array]  # keys and values of all layers


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions (spec stage 3, 6.2)."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, store: Store | None, layer: jax.Array
    ) -> tuple[jax.Array, Store | None]:
        """Maps `(B, N, width)` to `(B, N, width)`; writes to `store` if there is one."""
        config = self.config
        q, k, v = self._queries_keys_values(x, context.train)
        q, k = (rotate(part, context.cos, context.sin) for part in (q, k))
        if store is not None:
            start = (layer, 0, context.slot, 0, 0)
            store = tuple(
                jax.lax.dynamic_update_slice(whole, part[None].astype(whole.dtype), start)
                for whole, part in zip(store, (k, v), strict=True)
            )
            if context.read_cache:
                k, v = (
                    jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False) for whole in store
                )
        shown = {"mask": context.mask, "segments": context.segments, "causal": context.causal}
        mixed = dot_product_attention(q, k, v, **shown)
        heads = ((config.num_heads, config.head_dim), ("heads", "head_dim"))
        out = _linear(config, "o", heads, ((config.width,), ("embed",)))(mixed, context.train)
        return out, store

    def _queries_keys_values(self, x: jax.Array, train: bool) -> list[jax.Array]:
        """Queries `(B, N, h, d)`, keys and values `(B, N, g, d)`."""
        config = self.config

        def project(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
            source = ((config.width,), ("embed",))
            return _linear(config, name, source, (shape, axes))(x, train)

        groups, head_dim = config.num_kv_heads, config.head_dim
        if not config.fused_qkv:
            heads = {"q": config.num_heads, "k": groups, "v": groups}
            return [project(n, (h, head_dim), ("heads", "head_dim")) for n, h in heads.items()]
        # One group holds the query heads of a key head, then that key head, then its value head.
        per_group = config.num_heads // groups + 2
        qkv = project("qkv", (groups, per_group, head_dim), ("heads", None, "head_dim"))
        q = qkv[..., :-2, :].reshape(*x.shape[:-1], config.num_heads, head_dim)
        return [q, qkv[..., -2, :], qkv[..., -1, :]]


Axes = tuple[tuple[int, ...], tuple[str | None, ...]]  # sizes and logical names


def _linear(config: DecoderConfig, name: str, source: Axes, target: Axes) -> Linear:
    """A block's linear map without bias, with its adapter if it has one."""
    return Linear(
        source[0],
        target[0],
        source[1],
        target[1],
        use_bias=False,
        precision=config.precision,
        lora=config.adapter(name),
        name=name,
    )


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))` (spec stage 3, 6.2)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `(..., width)` to `(..., width)`."""
        config = self.config
        inner, outer = ((config.width,), ("embed",)), ((config.mlp_width,), ("mlp",))

        gate = jax.nn.silu(_linear(config, "gate", inner, outer)(x, train))
        hidden = gate * _linear(config, "up", inner, outer)(x, train)
        return _linear(config, "down", outer, inner)(hidden, train)


class DecoderBlock(nn.Module):
    """Pre-norm block: attention and gated MLP, each added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, store: Store | None, layer: jax.Array
    ) -> tuple[jax.Array, Store | None]:
        """Maps `(B, N, width)` to `(B, N, width)`; passes the cache on."""
        config = self.config
        norm = {"epsilon": config.norm_epsilon, "precision": config.precision}
        normed = RMSNorm(config.width, **norm, name="norm1")(x)
        mixed, store = DecoderAttention(config, name="attn")(normed, context, store, layer)
        x = x + mixed
        normed = RMSNorm(config.width, **norm, name="norm2")(x)
        return x + GatedMlp(config, name="mlp")(normed, context.train), store


@struct.dataclass
class DecoderOutput:
    """What a `Decoder` returns.

    Attributes:
        hidden: `(B, N, width)` after the final norm.
        features: `(K, B, N, width)` residual stream after the asked-for blocks, or None.
        cache: the cache with this pass's tokens in it, or None.
    """

    hidden: jax.Array
    features: jax.Array | None
    cache: KVCache | None


class Decoder(nn.Module):
    """The scanned stack of blocks and the final norm, from embeddings to hidden states."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        prefill: bool = False,
        return_layers: tuple[int, ...] = (),
        train: bool = False,
    ) -> DecoderOutput:
        """Runs the decoder; causal.

        Without a cache, and in a prefill, a token sees the tokens of this pass that come before
        it; with one, all real tokens in the cache whose position is not larger than its own.

        Args:
            x: `(B, N, width)` embeddings.
            mask: bool `(B, N)`, False = padding, which no other token sees; padding may stand
                left or right. Without a cache also `(B, N, N)`, query by key. None: all tokens are
                real. A token that sees nothing gets zeros from attention: what comes out at
                padding is finite and means nothing.
            positions: int `(B, N)` rotary positions. None: real tokens are counted, after those
                in the cache, and in each sample of a packed row from 0 on.
            segment_ids: int `(B, N)` of packed rows: tokens see those of the same number only,
                which stand side by side; 0 for padding. Not with a cache. None: one sample a row.
            cache: keys and values so far. With fewer than `N` free slots the result is NaN.
            prefill: the promise that `cache` is empty: it is written but not read, which saves
                attending to its free slots.
            return_layers: blocks whose outputs are collected, ascending; negative ones count from
                the end.
            train: adapters' dropout, from the rng stream `dropout`.

        Raises:
            ConfigError: `return_layers` is out of range or not ascending.
            ValueError: `mask` or `segment_ids` of another shape, too long a pass for the cache, or
                packed rows with a cache.
        """
        config = self.config
        batch, length, _ = x.shape
        mask = _checked(mask, (batch, length), cache)
        if segment_ids is not None and (segment_ids.shape != (batch, length) or cache is not None):
            raise ValueError(
                f"segment_ids of shape {segment_ids.shape} must be {(batch, length)}, without cache"
            )
        if positions is None:
            positions = (
                positions_of(mask)
                if mask is not None and mask.ndim == 2
                else jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
            )
            if segment_ids is not None:
                positions = _within_segments(positions, segment_ids)
            if cache is not None:
                positions = positions + cache.next_position[:, None]
        if cache is not None:
            real = positions if mask is None else jnp.where(mask, positions, -1)
            slots = jax.lax.dynamic_update_slice(
                cache.positions, real.astype(jnp.int32), (0, cache.length)
            )
            # Written past its end, the cache would silently lose its last tokens.
            x = jnp.where(cache.length + length <= slots.shape[1], x, jnp.nan)
        reads = cache is not None and not prefill
        cos, sin = rotation(positions, config.head_dim, config.rope)
        context = Context(
            cos=cos,
            sin=sin,
            mask=_cache_mask(positions, slots, config) if reads else _own_mask(mask, x, config),
            segments=segment_ids,
            slot=None if cache is None else cache.length,
            causal=not reads,
            read_cache=reads,
            train=train,
        )
        store = None if cache is None else (cache.keys, cache.values)
        layers = resolve_layers(return_layers, config.depth, "return_layers")
        blocks = self.variables.get("params", {}).get("blocks")
        if isinstance(blocks, tuple):
            x, store, features = _one_by_one(config, blocks, x, store, context, layers)
        else:
            x, store, features = _scan(config, x, store, context, layers)
        if cache is not None:
            cache = KVCache(store[0], store[1], slots, cache.length + length)
        norm = RMSNorm(
            config.width, epsilon=config.norm_epsilon, precision=config.precision, name="norm"
        )
        return DecoderOutput(norm(x), features, cache)


def _checked(
    mask: jax.Array | None, shape: tuple[int, int], cache: KVCache | None
) -> jax.Array | None:
    """The mask as bool, after checks of its shape and of the cache's room."""
    if cache is not None and shape[1] > cache.positions.shape[1]:
        raise ValueError(
            f"{shape[1]} tokens do not fit a cache of {cache.positions.shape[1]} slots"
        )
    if mask is None:
        return None
    allowed = [shape] if cache is not None else [shape, (*shape, shape[1])]
    if mask.shape not in allowed:
        raise ValueError(f"mask of shape {mask.shape} must be {' or '.join(map(str, allowed))}")
    return mask.astype(jnp.bool_)


def _within_segments(positions: jax.Array, segments: jax.Array) -> jax.Array:
    """Positions that count from 0 on in every segment of a row."""
    changes = segments[:, 1:] != segments[:, :-1]
    first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    return positions - jax.lax.cummax(jnp.where(first, positions, 0), axis=1)


def _own_mask(mask: jax.Array | None, x: jax.Array, config: DecoderConfig) -> jax.Array | None:
    """Mask among the tokens of one pass, beside the causal one; None if nothing is hidden."""
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
    length = x.shape[1]
    if config.sliding_window is not None and config.sliding_window < length:
        index = jnp.arange(length)
        near = index[:, None] - index[None, :] < config.sliding_window
        mask = near[None, None] if mask is None else mask & near[None, None]
    return mask


def _cache_mask(positions: jax.Array, slots: jax.Array, config: DecoderConfig) -> jax.Array:
    """Mask `(B, 1, N, slots)` between queries at `positions` and the tokens in the cache."""
    distance = positions[:, :, None] - slots[:, None, :]
    seen = (distance >= 0) & (slots >= 0)[:, None, :]
    if config.sliding_window is not None:
        seen &= distance < config.sliding_window
    return seen[:, None]


def _one_by_one(
    config: DecoderConfig,
    blocks: tuple[Mapping[str, Any], ...],
    x: jax.Array,
    store: Store | None,
    context: Context,
    layers: tuple[int, ...],
) -> tuple[jax.Array, Store | None, jax.Array | None]:
    """Runs the blocks with parameters of their own, as `decoding.unstacked` gives them.

    A scan copies the slice of every stacked kernel before it multiplies with it, which takes as
    long as the product itself where there is one token a row.
    """
    if context.train:
        raise ValueError("unstacked parameters are for decoding: train with stacked ones")
    features = []
    for layer, params in enumerate(blocks):
        block = DecoderBlock(config, parent=None)
        x, store = block.apply({"params": params}, x, context, store, jnp.int32(layer))
        features += [x] if layer in layers else []
    return x, store, jnp.stack(features) if features else None


def _scan(
    config: DecoderConfig,
    x: jax.Array,
    store: Store | None,
    context: Context,
    layers: tuple[int, ...],
) -> tuple[jax.Array, Store | None, jax.Array | None]:
    """Runs the blocks, parameters stacked on a leading axis `layers`.

    The cache is carried whole and written in place: as an input and output of the scan it would be
    copied once a token. Asked-for outputs are collected as in `block_stack.scan_blocks`.
    """
    slots = np.full(config.depth, len(layers), np.int32)
    slots[list(layers)] = np.arange(len(layers))

    def apply_block(
        mdl: nn.Module, x: jax.Array, context: Context, store: Store | None, layer: jax.Array
    ) -> tuple[jax.Array, Store | None]:
        return mdl(x, context, store, layer)

    if config.remat != "none":
        apply_block = nn.remat(apply_block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)

    def body(mdl: nn.Module, carry: tuple, xs: tuple, context: Context) -> tuple[tuple, None]:
        x, store, features = carry
        layer, slot = xs
        x, store = apply_block(mdl, x, context, store, layer)
        if features is not None:
            features = jax.lax.dynamic_update_index_in_dim(features, x, slot, axis=0)
        return (x, store, features), None

    scan = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast),
        length=config.depth,
        unroll=min(config.scan_unroll, config.depth),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    features = jnp.zeros((len(layers) + 1, *x.shape), x.dtype) if layers else None
    block = DecoderBlock(config, name="blocks")
    xs = (jnp.arange(config.depth, dtype=jnp.int32), jnp.asarray(slots))
    (x, store, features), _ = scan(block, (x, store, features), xs, context)
    return x, store, None if features is None else features[:-1]
