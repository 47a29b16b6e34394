"""The masked student: a video encoder with decoders that speak the teachers' feature spaces."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models.block_stack import resolve_layers
from iv2_jax.models.layers import LayerNorm, Linear, Precision, unit_length
from iv2_jax.models.positions import area_weights
from iv2_jax.models.video_encoder import (
    EncoderConfig,
    PositionTables,
    VideoEncoder,
    position_params,
)

DECODERS = ("linear", "mlp")


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
    """How one teacher's token features are matched.

    Attributes:
        width: features of a teacher token.
        layers: student blocks that are matched, ascending, one for each teacher layer; negative
            numbers count from the end.
        decoder: 'linear' (linear, LayerNorm) or 'mlp' (linear, erf GELU, linear, LayerNorm).
        has_cls: the teacher has a class token, matched with the student's.
        grid: the teacher's patches along time, height and width; None means the student's own.
    """

    width: int
    layers: tuple[int, ...]
    decoder: str
    has_cls: bool
    grid: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"width={self.width}: the teacher's token size must be at least 1")
        if not self.layers:
            raise ConfigError("layers=(): name at least one student block, or leave the branch out")
        _check_decoder("decoder", self.decoder)
        if self.grid is not None and (len(self.grid) != 3 or min(self.grid) < 1):
            raise ConfigError(f"grid={self.grid}: three positive sizes (T, H, W) are needed")


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """A student: its encoder and up to three alignments (spec stage1 3 and 5).

    Attributes:
        encoder: the video encoder.
        clip: alignment with the image teacher's tokens, or None.
        mae: alignment with the video teacher's tokens, or None.
        final_width: size of the image teacher's pooled feature; 0 leaves that alignment out.
        final_decoder: 'linear' or 'mlp'.
        normalize: outputs have unit length (spec 3.2); False leaves them as they are.

    Raises:
        ConfigError: a field does not fit; the message names it.
    """

    encoder: EncoderConfig
    clip: AlignmentConfig | None
    mae: AlignmentConfig | None
    final_width: int
    final_decoder: str
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.final_width < 0:
            raise ConfigError(f"final_width={self.final_width}: 0 (none) or a size is needed")
        _check_decoder("final_decoder", self.final_decoder)
        for name in ("clip", "mae"):
            self._layers(name)
        if self.final_width and not self.encoder.pool:
            raise ConfigError(f"final_width={self.final_width} needs encoder.pool=True")

    def _layers(self, name: str) -> tuple[int, ...]:
        """Student blocks of a branch, from 0, ascending; none if there is no such branch."""
        branch = getattr(self, name)
        return resolve_layers(branch.layers, self.encoder.depth, f"{name}.layers") if branch else ()

    @property
    def clip_layers(self) -> tuple[int, ...]:
        """Student blocks matched with the image teacher, from 0, ascending."""
        return self._layers("clip")

    @property
    def mae_layers(self) -> tuple[int, ...]:
        """Student blocks matched with the video teacher, from 0, ascending."""
        return self._layers("mae")


def _check_decoder(field: str, kind: str) -> None:
    if kind not in DECODERS:
        raise ConfigError(f"{field}={kind!r}: choose one of {', '.join(DECODERS)}")


@flax.struct.dataclass
class StudentOutput:
    """Decoded student features, unit length if the config says so.

    A branch on the student's own grid holds the visible tokens only and has no weight: its targets
    are the teacher's tokens gathered by `visible`. A branch on another grid holds every teacher
    cell, and its weight says which of them any visible token touches.

    Attributes:
        clip: `(K, B, N, C)` or None.
        clip_weight: `(B, N)` float32, 0 or 1, or None.
        final: `(B, C)` or None.
        mae: `(K, B, N, C)` or None; N leaves the class token out unless `mae.has_cls`.
        mae_weight: `(B, N)` float32, 0 or 1, or None.
        tokens: `(B, N, D)` the encoder's visible tokens after the last block.
        pooled: `(B, pool_width)` the encoder's pooled vector, or None.
    """

    clip: jax.Array | None = None
    clip_weight: jax.Array | None = None
    final: jax.Array | None = None
    mae: jax.Array | None = None
    mae_weight: jax.Array | None = None
    tokens: jax.Array | None = None
    pooled: jax.Array | None = None


class AlignmentDecoder(nn.Module):
    """Maps student features to a teacher's space (spec stage1 3.2).

    Attributes:
        in_width: size of the input vectors.
        in_axis: logical name of the input axis.
        out_width: size of the teacher's vectors.
        kind: 'linear' or 'mlp'.
        normalize: scale outputs to unit length.
        precision: dtypes.
    """

    in_width: int
    in_axis: str
    out_width: int
    kind: str
    normalize: bool = True
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(..., in_width)` to `(..., out_width)`."""
        inner, outer = ((self.in_width,), (self.in_axis,)), ((self.out_width,), ("target",))
        if self.kind == "linear":
            x = self._linear("fc", inner, outer)(x)
        else:
            hidden = ((self.in_width,), ("mlp",))
            x = jax.nn.gelu(self._linear("fc1", inner, hidden)(x), approximate=False)
            x = self._linear("fc2", hidden, outer)(x)
        x = LayerNorm(self.out_width, axis_name="target", precision=self.precision, name="norm")(x)
        return unit_length(x) if self.normalize else x

    def _linear(self, name: str, inner: tuple, outer: tuple) -> Linear:
        return Linear(inner[0], outer[0], inner[1], outer[1], precision=self.precision, name=name)


# K decoders with parameters stacked on a leading axis, applied to K features at once.
_StackedDecoder = nn.vmap(
    AlignmentDecoder,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    metadata_params={nn.PARTITION_NAME: None},
)


class Student(nn.Module):
    """Video encoder over the visible tokens, with alignment decoders.

    Attributes:
        config: encoder and alignments.
    """

    config: StudentConfig

    def setup(self) -> None:
        """Makes the encoder and the branches the config names."""
        c = self.config
        self.encoder = VideoEncoder(c.encoder)
        for name in ("clip", "mae"):
            branch = getattr(c, name)
            if branch is not None:
                positions = position_params(
                    self, f"{name}_pos_embed", c.encoder, has_cls=branch.has_cls
                )
                setattr(self, f"{name}_positions", positions)
                setattr(self, f"{name}_decoder", self._decoder(branch))
        if c.final_width:
            self.final_clip_decoder = AlignmentDecoder(
                c.encoder.pool_width,
                "pool",
                c.final_width,
                c.final_decoder,
                c.normalize,
                c.encoder.precision,
            )

    def _decoder(self, branch: AlignmentConfig) -> nn.Module:
        c = self.config
        return _StackedDecoder(
            c.encoder.width, "embed", branch.width, branch.decoder, c.normalize, c.encoder.precision
        )

    def __call__(
        self, video: jax.Array, visible: jax.Array | None = None, *, train: bool = False
    ) -> StudentOutput:
        """Encodes the visible tokens and decodes them into the teachers' spaces.

        Args:
            video: `(B, T, H, W, 3)` normalised pixels, the student's frames; one frame is an
                image if `encoder.image_positions` takes them.
            visible: int `(B, N)` sorted token numbers, the class token (0) always among them;
                None for all tokens.
            train: turns DropPath on (rng stream `droppath`).

        Returns:
            `StudentOutput`.
        """
        c = self.config
        layers = tuple(sorted({*c.clip_layers, *c.mae_layers}))
        encoded = self.encoder(video, visible, return_layers=layers, train=train)
        place = partial(self._align, visible=visible, is_image=c.encoder.is_image(video.shape[1]))
        clip = clip_weight = final = mae = mae_weight = None
        if c.clip is not None:
            features = _select(encoded.features, layers, c.clip_layers)
            clip, clip_weight = place(features, c.clip, self.clip_positions, self.clip_decoder)
        if c.mae is not None:
            features = _select(encoded.features, layers, c.mae_layers)
            mae, mae_weight = place(features, c.mae, self.mae_positions, self.mae_decoder)
        if c.final_width:
            final = self.final_clip_decoder(encoded.pooled)
        return StudentOutput(
            clip, clip_weight, final, mae, mae_weight, encoded.tokens, encoded.pooled
        )

    def _align(
        self,
        features: jax.Array,
        branch: AlignmentConfig,
        positions: PositionTables,
        decoder: nn.Module,
        *,
        visible: jax.Array | None,
        is_image: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Adds the branch's positions to `(K, B, N, D)`, pools to its grid if needed, decodes."""
        encoder, split = self.config.encoder, int(branch.has_cls)
        if not branch.has_cls:
            features = features[:, :, 1:]
        index = visible
        if visible is not None and not branch.has_cls:
            index = visible[:, 1:] - 1
        dtype = encoder.precision.compute_dtype
        features = features + positions.rows(index, is_image=is_image, dtype=dtype)
        # The teacher sees an image as one frame too.
        grid, to_grid = encoder.grid, branch.grid or encoder.grid
        if is_image:
            grid, to_grid = encoder.image_grid, (1, *to_grid[1:])
        if grid == to_grid:
            return decoder(features), None
        patches = _patch_numbers(features.shape[1], math.prod(grid), visible)
        cells, weight = pool_to_grid(features[:, :, split:], patches, grid, to_grid)
        cells = jnp.concatenate([features[:, :, :split], cells], axis=2)
        weight = jnp.pad(weight, ((0, 0), (split, 0)), constant_values=1.0)
        return decoder(cells), weight


def _patch_numbers(batch: int, count: int, visible: jax.Array | None) -> jax.Array:
    """Numbers `(B, M)` of the visible patches, or of all `count` of them."""
    if visible is None:
        return jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    return visible[:, 1:] - 1


def _select(features: jax.Array, layers: tuple[int, ...], wanted: tuple[int, ...]) -> jax.Array:
    """Takes the wanted blocks' features out of `(len(layers), ...)`, as a slice where it is one."""
    index = [layers.index(layer) for layer in wanted]
    if index == list(range(index[0], index[-1] + 1)):
        return features[index[0] : index[-1] + 1]
    return jnp.stack([features[i] for i in index])


def pool_to_grid(
    features: jax.Array,
    patches: jax.Array,
    from_grid: tuple[int, int, int],
    to_grid: tuple[int, int, int],
) -> tuple[jax.Array, jax.Array]:
    """Averages visible patches over the cells of another grid of the same clip.

    A patch counts in a cell by the volume they share (overlap lengths along time, height and
    width, multiplied); a cell's feature is the weighted mean over the visible patches it meets.

    Args:
        features: `(K, B, M, D)` features of visible patches.
        patches: int `(B, M)` patch numbers in `from_grid`.
        from_grid: `(T, H, W)` of the patches.
        to_grid: `(T', H', W')` of the cells.

    Returns:
        `(K, B, T'*H'*W', D)` in the dtype of `features`, zero for cells without visible patches,
        and `(B, T'*H'*W')` float32: 1 where a cell has any visible patch, else 0.
    """
    frame, place = jnp.divmod(patches, from_grid[1] * from_grid[2])
    row, column = jnp.divmod(place, from_grid[2])
    overlap = [
        jnp.take(jnp.asarray(area_weights(size, new_size).T, jnp.float32), index, axis=0)
        for size, new_size, index in zip(from_grid, to_grid, (frame, row, column), strict=True)
    ]
    weights = jnp.einsum("bmt,bmh,bmw->bmthw", *overlap).reshape(*patches.shape, -1)
    total = jnp.sum(weights, axis=1)
    weights = weights / jnp.where(total > 0, total, 1.0)[:, None]
    cells = jnp.einsum("bmc,kbmd->kbcd", weights.astype(features.dtype), features)
    return cells, (total > 0).astype(jnp.float32)
