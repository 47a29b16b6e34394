"""Fits an encoder's parameters to another clip or a shorter stack: positions, patches, blocks.

The steps that `recipes` is made of. All take plain parameter trees, return new ones and copy only
what changes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop.entries import Entry
from iv2_jax.interop.torch_keys.video import encoder_map
from iv2_jax.models import positions
from iv2_jax.models.video_encoder import EncoderConfig

Params = dict[str, Any]

INFLATIONS = ("center", "mean")

# Path of a position table; groups: it is that of images, which part of a separable one it is.
TABLE = re.compile(r"(?:.*/)?(?:clip_|mae_)?(img_)?pos_embed(_spatial|_temporal|_cls)?")


def cut_encoder(params: Mapping[str, Any], source: EncoderConfig, target: EncoderConfig) -> Params:
    """An encoder without its last blocks, without its pool, or both ("x_vis" early exit).

    Args:
        params: the encoder's parameters.
        source: its config.
        target: the same with less `depth`, or with `pool=False`.

    Returns:
        The cut encoder's parameters.

    Raises:
        CheckpointError: `params` do not fit `source`.
        ConfigError: `target` differs from `source` in another way.
    """
    check(params, encoder_map(source), "the encoder's parameters")
    if target.depth > source.depth or (target.pool and not source.pool):
        raise ConfigError(
            f"depth={target.depth}, pool={target.pool}: a cut leaves parts out of "
            f"depth={source.depth}, pool={source.pool}"
        )
    _same_shape(dataclasses.replace(source, depth=target.depth, pool=target.pool), target)
    out = {name: value for name, value in params.items() if name != "pool" or target.pool}
    if target.depth < source.depth:
        blocks = traverse_util.flatten_dict(params["blocks"])
        cut = {path: value[: target.depth] for path, value in blocks.items()}
        out["blocks"] = traverse_util.unflatten_dict(cut)
    return checked(out, encoder_map(target), "the cut encoder")


def fit_encoder(params: Mapping[str, Any], source: EncoderConfig, target: EncoderConfig) -> Params:
    """An encoder for clips of other frames or another size, with or without a table for images.

    Positions are interpolated as PyTorch does, linearly over time, then bicubically over space,
    the class token's row kept (spec stage1 6.6). A table for images is dropped if the target has
    none; if only the target has one, it starts as the sine-cosine table of one frame.

    Args:
        params: the encoder's parameters.
        source: its config.
        target: the wanted config.

    Returns:
        The fitted encoder's parameters.

    Raises:
        CheckpointError: `params` do not fit `source`.
        ConfigError: the configs differ in anything else that shapes parameters.
    """
    check(params, encoder_map(source), "the encoder's parameters")
    same = {"image_size", "num_frames", "image_positions"}
    _same_shape(
        dataclasses.replace(source, **{name: getattr(target, name) for name in same}), target
    )
    tables = {name: value for name, value in params.items() if TABLE.fullmatch(name)}
    out = {name: value for name, value in params.items() if name not in tables}
    out |= fit_tables(tables, source, target, "pos_embed")
    return checked(out, encoder_map(target), "the encoder")


def resize_positions(
    params: Mapping[str, Any], source: EncoderConfig, target: EncoderConfig
) -> Params:
    """Any tree that holds an encoder, with all its position tables fitted to another clip.

    This is what 4 to 8 to 16 frames, or 224 to 336 pixels, takes (spec stage1 6.6): the tables of
    the encoder and of alignment heads, joint or separable, linear over time and bicubic over
    space. Tables for images have no time and change with the image size only. Each table is found
    by its name; whatever keeps its size stays as it is, bit for bit.

    Args:
        params: the model's parameters.
        source: config of the encoder in it.
        target: config with the wanted `num_frames` and `image_size`.

    Returns:
        The parameters, tables resized.

    Raises:
        ConfigError: no table is there, or one does not have the size of `source`.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    found = {path: match for path in flat if (match := TABLE.fullmatch(path))}
    if not found:
        raise ConfigError("no position table is among the parameters")
    for path, match in found.items():
        grids = [_table_grid(config, *match.groups()) for config in (source, target)]
        has_cls = np.shape(flat[path])[1] == int(np.prod(grids[0])) + 1
        if match[2] != "_cls" and grids[0] != grids[1]:
            flat[path] = positions.resize_positions(flat[path], *grids, has_cls=has_cls)
    return traverse_util.unflatten_dict(flat, sep="/")


def inflate_patch_embed(kernel: Any, tubelet: int, mode: str = "center") -> np.ndarray:
    """A patch embedding of several frames from one of a single frame (spec stage1 6.5).

    Args:
        kernel: `(1, p, p, C, D)` or, of an image model, `(p, p, C, D)`.
        tubelet: frames of the wanted patch.
        mode: 'center' puts the kernel at frame `tubelet // 2` and zeros elsewhere; 'mean' puts its
            `tubelet`-th part at every frame.

    Returns:
        `(tubelet, p, p, C, D)`.

    Raises:
        ConfigError: `mode` is unknown, `tubelet` is below 1, or the kernel has several frames.
    """
    if mode not in INFLATIONS:
        raise ConfigError(f"mode={mode!r}: choose one of {', '.join(INFLATIONS)}")
    if tubelet < 1:
        raise ConfigError(f"tubelet={tubelet}: at least 1 is needed")
    kernel = np.asarray(kernel)
    kernel = kernel[None] if kernel.ndim == 4 else kernel
    if kernel.ndim != 5 or len(kernel) != 1:
        raise ConfigError(f"a kernel of shape {kernel.shape} is not that of a single frame")
    if mode == "mean":
        return np.repeat(kernel / tubelet, tubelet, axis=0)
    inflated = np.zeros((tubelet, *kernel.shape[1:]), kernel.dtype)
    inflated[tubelet // 2] = kernel[0]
    return inflated


def fit_tables(
    tables: Mapping[str, Any], source: EncoderConfig, target: EncoderConfig, name: str
) -> Params:
    """Fits one set of position tables to another clip, the table for images as `target` wants it.

    Args:
        tables: `name`, its separable parts, its table for images: those that `source` has.
        source: config of the encoder they come from.
        target: config of the encoder they go to.
        name: `pos_embed` or `clip_pos_embed`; the tables have a row for the class token.

    Returns:
        The tables that `target` has.
    """
    image = name.removesuffix("pos_embed") + "img_pos_embed"
    out = resize_positions(tables, source, target)
    if target.image_positions != "own":
        out.pop(image, None)
    elif image not in out:
        table = positions.sincos_3d(target.width, target.image_grid, has_cls=True)
        out[image] = table[None].astype(np.asarray(tables[name]).dtype)
    return out


def _table_grid(config: EncoderConfig, image: str | None, part: str | None) -> tuple[int, int, int]:
    """Grid of a position table, by the parts of its name."""
    frames, rows, columns = config.grid
    if part == "_temporal":
        return frames, 1, 1
    return (1 if image or part == "_spatial" else frames), rows, columns


def _same_shape(one: EncoderConfig, other: EncoderConfig) -> None:
    """Refuses encoders whose parameters differ, naming the fields."""
    fields = [field.name for field in dataclasses.fields(EncoderConfig)]
    differ = [f for f in fields if f in _SHAPING and getattr(one, f) != getattr(other, f)]
    if differ:
        text = ", ".join(f"{f} {getattr(one, f)} and {getattr(other, f)}" for f in differ)
        raise ConfigError(f"the encoders differ in what cannot be fitted: {text}")


_SHAPING = {
    "width",
    "depth",
    "num_heads",
    "mlp_width",
    "patch_size",
    "tubelet",
    "image_size",
    "num_frames",
    "pool_heads",
    "pool_width",
    "qkv_bias",
    "qk_norm",
    "separable_positions",
    "image_positions",
    "pool",
}


def checked(params: Params, entries: Iterable[Entry], what: str) -> Params:
    """Gives `params` back after `check`."""
    check(params, entries, what)
    return params


def check(params: Mapping[str, Any], entries: Iterable[Entry], what: str) -> None:
    """Refuses a tree that has not exactly the parameters and shapes of a model.

    Raises:
        CheckpointError: names what is missing, left over or of another shape.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    found = {path: tuple(np.shape(value)) for path, value in flat.items()}
    wanted = {entry.path: entry.shape for entry in entries}
    lines = [f"{path} is missing" for path in wanted if path not in found]
    lines += [f"{path} is left over" for path in found if path not in wanted]
    lines += [
        f"{path} is {found[path]}, {wanted[path]} is wanted"
        for path in wanted
        if path in found and found[path] != wanted[path]
    ]
    if lines:
        more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise CheckpointError("\n  ".join([f"{what} does not fit its config:", *lines[:10], *more]))
