"""The transformer block and the scan that runs a stack of them with stacked parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from iv2_jax.errors import ConfigError
from iv2_jax.models.attention import ATTENTION_OUTPUT, Attention
from iv2_jax.models.layers import (
    DropPath,
    Initializer,
    LayerScale,
    Mlp,
    Precision,
    RMSNorm,
    kernel_init,
)

RESIDUAL = "residual"  # name of the residual stream between a block's halves

_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
# What is kept for the backward pass, most first. Of what a policy keeps only that is stored which
# the backward pass reads.
REMAT_POLICIES = {
    "none": None,
    "named": jax.checkpoint_policies.save_from_both_policies(
        _dots, jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT, RESIDUAL)
    ),
    "dots": _dots,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def depth_scaled(init: Initializer, layer: jax.Array | int) -> Initializer:
    """Returns `init` divided by sqrt(2 (layer + 1)), for maps that write to the residual stream.

    `layer` may be traced: in a scanned stack every block draws its own slice of the stacked
    parameter, with its own divisor (spec stage1 2.10).
    """

    def scaled(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        divisor = jnp.sqrt(2.0 * (jnp.asarray(layer, jnp.float32) + 1.0))
        return (init(key, shape, jnp.float32) / divisor).astype(dtype)

    return scaled


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and DropPath (spec stage1 2.4).

    Attributes:
        width: size of a token.
        num_heads: attention heads.
        mlp_width: hidden size of the MLP.
        qkv_bias: bias on queries, keys and values.
        qk_norm: RMS-normalise queries and keys over the width.
        layer_scale_init: starting value of both LayerScale factors.
        tanh_gelu: tanh form of GELU in the MLP.
        precision: dtypes.
        fold_layer_scale: multiply LayerScale into the weights of the map before it, in float32.
            The same function; the backward pass then has no use for that map's output.
    """

    width: int
    num_heads: int
    mlp_width: int
    qkv_bias: bool = False
    qk_norm: bool = True
    layer_scale_init: float = 1e-5
    tanh_gelu: bool = True
    precision: Precision = Precision()
    fold_layer_scale: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array | int = 0,
        drop_rate: jax.Array | float | None = None,
    ) -> jax.Array:
        """Runs the block.

        Args:
            x: `(B, N, width)` residual stream.
            layer: place in the stack, from 0; only initialisation uses it.
            drop_rate: DropPath probability of both branches; None turns it off.

        Returns:
            `(B, N, width)` residual stream.
        """
        out_init = depth_scaled(kernel_init, layer)
        common = {"precision": self.precision}
        attention = Attention(
            self.width,
            self.num_heads,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            out_init=out_init,
            name="attn",
            **common,
        )
        mlp = Mlp(
            self.width, self.mlp_width, self.tanh_gelu, out_init=out_init, name="mlp", **common
        )
        x = x + DropPath(name="drop_path1")(self._branch(1, attention, x), drop_rate)
        x = checkpoint_name(x, RESIDUAL)
        return x + DropPath(name="drop_path2")(self._branch(2, mlp, x), drop_rate)

    def _branch(self, number: int, layer: nn.Module, x: jax.Array) -> jax.Array:
        """Norm, `layer` and LayerScale: one half of the block without its residual."""
        normed = RMSNorm(self.width, name=f"norm{number}", precision=self.precision)(x)
        scale = LayerScale(
            self.width, self.layer_scale_init, name=f"ls{number}", precision=self.precision
        )
        if self.fold_layer_scale:
            return layer(normed, out_scale=scale(None))
        return scale(layer(normed))


def resolve_layers(layers: tuple[int, ...], depth: int, field: str) -> tuple[int, ...]:
    """Turns negative block numbers into positive ones and checks them.

    Args:
        layers: block numbers in [-depth, depth), ascending once resolved.
        depth: number of blocks.
        field: name of the field for the error message.

    Returns:
        Block numbers in [0, depth), strictly ascending.

    Raises:
        ConfigError: a number is out of range, or they do not ascend.
    """
    resolved = tuple(i + depth if i < 0 else i for i in layers)
    if any(not 0 <= i < depth for i in resolved):
        raise ConfigError(f"{field}={layers}: blocks are numbered 0..{depth - 1} (or -{depth}..-1)")
    if any(a >= b for a, b in itertools.pairwise(resolved)):
        raise ConfigError(f"{field}={layers}: list blocks in ascending order, each once")
    return resolved


@jax.custom_vjp
def _collect(features: jax.Array, x: jax.Array, slot: jax.Array) -> jax.Array:
    """Writes `x` `(...)` to `features[slot]` `(K + 1, ...)`, of which `[:K]` are written once.

    Hence gradients of the features are those of the blocks' outputs as they are; the general rule
    would clear a slot's in every block.
    """
    return jax.lax.dynamic_update_index_in_dim(features, x, slot, axis=0)


def _collect_forward(
    features: jax.Array, x: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _collect(features, x, slot), slot


def _collect_backward(slot: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    return grad, jax.lax.dynamic_index_in_dim(grad, slot, axis=0, keepdims=False), None


_collect.defvjp(_collect_forward, _collect_backward)


def scan_blocks(
    block: nn.Module,
    tokens: jax.Array,
    *,
    depth: int,
    return_layers: tuple[int, ...] = (),
    drop_path_rate: float = 0.0,
    remat: str = "none",
    unroll: int = 1,
    train: bool = False,
    call: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs `depth` copies of `block`, whose parameters get a leading axis named `layers`.

    The copies are scanned, so one block is compiled however deep the stack is. Asked-for outputs
    are collected in a carried buffer with one slot for each and a spare one, which all other
    blocks overwrite: one loop body serves any set of layers, and memory is that of K + 1
    features, not of `depth`.

    Args:
        block: module with `(x, layer, drop_rate) -> x`; a child of the calling module, whose name
            is the name of the stacked parameters.
        tokens: `(B, N, D)`.
        depth: number of blocks.
        return_layers: blocks whose outputs are collected, ascending, in [0, depth).
        drop_path_rate: DropPath probability of the last block; it grows linearly from 0 at the
            first block. Active only when `train`.
        remat: what the backward pass recomputes inside a block: 'none', 'named' (everything but
            matrix products, attention's output and the residual stream between halves), 'dots'
            (everything but matrix products) or 'full'.
        unroll: blocks in one loop iteration.
        train: draws DropPath from the rng stream `droppath`.
        call: `(block, x, layer, drop_rate) -> x`, for blocks that are called otherwise, such as
            with a mask or a context (arrays it closes over are shared by all blocks); None calls
            `block(x, layer, drop_rate)`. Dropout draws anew in each block (rng `dropout`).

    Returns:
        Tokens after the last block `(B, N, D)` and features `(K, B, N, D)`, or None when
        `return_layers` is empty.
    """
    num_features = len(return_layers)
    slots = np.full(depth, num_features, np.int32)
    slots[list(return_layers)] = np.arange(num_features)
    use_drop_path = train and drop_path_rate > 0
    rates = np.linspace(0.0, drop_path_rate, depth, dtype=np.float32) if use_drop_path else None

    def apply_block(
        mdl: nn.Module, x: jax.Array, layer: jax.Array, rate: jax.Array | None
    ) -> jax.Array:
        return mdl(x, layer, rate) if call is None else call(mdl, x, layer, rate)

    if remat != "none":
        # Only the block is wrapped: with the buffer inside, every layer would save a copy of it.
        apply_block = nn.remat(apply_block, policy=REMAT_POLICIES[remat], prevent_cse=False)

    def body(mdl: nn.Module, carry: tuple, xs: tuple) -> tuple[tuple, None]:
        x, features = carry
        layer, slot, rate = xs
        x = apply_block(mdl, x, layer, rate)
        if features is not None:
            features = _collect(features, x, slot)
        return (x, features), None

    scan = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "droppath": True, "dropout": True},
        length=depth,
        unroll=min(unroll, depth),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    features = None
    if num_features:
        features = jnp.zeros((num_features + 1, *tokens.shape), tokens.dtype)
    xs = (np.arange(depth, dtype=np.int32), slots, rates)
    (tokens, features), _ = scan(block, (tokens, features), jax.tree.map(jnp.asarray, xs))
    return tokens, None if features is None else features[:num_features]
