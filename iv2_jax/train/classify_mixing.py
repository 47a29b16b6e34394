"""Random erasing, mixup and cutmix on the device (spec stage1 7.4).

What is drawn follows from a key alone, and rows are mixed within groups of neighbours: the result
does not depend on how the batch lies over devices, and groups that lie on one device are mixed
without sending pixels around.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import betaincinv

from iv2_jax.train.classify_config import ErasingConfig, MixupConfig

_TRIES = 10
_KNOTS = 4097


class Draw(NamedTuple):
    """How G groups are mixed.

    Attributes:
        keep: (G,) float32, share of a row's own target.
        own: (G, H, W) float32, share of a row's own pixels.
    """

    keep: jax.Array
    own: jax.Array


def smooth_targets(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """(B,) int labels as distributions (B, C) float32: `smoothing` is spread over all classes."""
    hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return hot * (1.0 - smoothing) + smoothing / num_classes


def draw_mixing(config: MixupConfig, rng: jax.Array, groups: int, size: tuple[int, int]) -> Draw:
    """Draws for each group whether and how its rows are mixed.

    A blend's weight is Beta(mixup, mixup). A box has the share 1 - Beta(cutmix, cutmix) of the
    picture, its centre anywhere; where it reaches over the edge, its real area counts.

    Args:
        config: what may be drawn.
        rng: key.
        groups: G.
        size: (H, W) of the pictures.
    """
    on_rng, kind_rng, blend_rng, box_rng, y_rng, x_rng = jax.random.split(rng, 6)
    height, width = size
    keep = jnp.ones(groups)
    own = jnp.ones((groups, height, width))
    if config.mixup > 0:
        keep = _beta(blend_rng, config.mixup, groups)
        own = jnp.broadcast_to(keep[:, None, None], own.shape)
    if config.cutmix > 0:
        side = jnp.sqrt(1.0 - _beta(box_rng, config.cutmix, groups))
        rows = _inside(y_rng, side, height)
        columns = _inside(x_rng, side, width)
        outside = 1.0 - rows[:, :, None] * columns[:, None, :]
        boxed = jnp.ones(groups, bool)
        if config.mixup > 0:
            boxed = jax.random.uniform(kind_rng, (groups,)) < config.switch
        keep = jnp.where(boxed, outside.mean((1, 2)), keep)
        own = jnp.where(boxed[:, None, None], outside, own)
    on = jax.random.uniform(on_rng, (groups,)) < config.probability
    return Draw(jnp.where(on, keep, 1.0), jnp.where(on[:, None, None], own, 1.0))


def _beta(rng: jax.Array, parameter: float, count: int) -> jax.Array:
    """(count,) draws of Beta(parameter, parameter), by a table of its quantiles.

    `jax.random.beta` draws by rejection: nested loops whose turns depend on the data, which take
    long to compile and cannot be planned.
    """
    knots = np.linspace(0.0, 1.0, _KNOTS)
    quantiles = betaincinv(parameter, parameter, knots).astype(np.float32)
    share = jax.random.uniform(rng, (count,))
    return jnp.interp(share, knots.astype(np.float32), quantiles)


def _inside(rng: jax.Array, share: jax.Array, length: int) -> jax.Array:
    """(G, length) float32: 1 where an interval of int(share * length) around a random centre is."""
    half = jnp.floor(share * length).astype(jnp.int32) // 2
    centre = jax.random.randint(rng, share.shape, 0, length)
    at = jnp.arange(length)
    low, high = (centre - half)[:, None], (centre + half)[:, None]
    return ((at >= low) & (at < high)).astype(jnp.float32)


def mix(
    video: jax.Array, targets: jax.Array, config: MixupConfig, rng: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixes each row with its partner, the group in reversed order.

    Args:
        video: (B, T, H, W, 3) normalised pixels.
        targets: (B, C) distributions.
        config: how.
        rng: key.

    Returns:
        Pixels and targets of the same shapes; targets still sum to 1.
    """
    size = config.group or len(video)
    groups = len(video) // size
    draw = draw_mixing(config, rng, groups, video.shape[2:4])

    def blend(x: jax.Array, own: jax.Array) -> jax.Array:
        grouped = x.reshape(groups, size, *x.shape[1:])
        own = own.astype(x.dtype)
        return (own * grouped + (1 - own) * grouped[:, ::-1]).reshape(x.shape)

    pixels = blend(video, draw.own[:, None, None, :, :, None])
    return pixels, blend(targets, draw.keep[:, None, None])


def erase(video: jax.Array, config: ErasingConfig, rng: jax.Array) -> jax.Array:
    """Puts a box of normal noise into some rows, at the same place in all frames.

    The area is uniform, the shape uniform in its logarithm; a row for which ten draws do not fit
    into the picture stays as it is.

    Args:
        video: (B, T, H, W, 3) normalised pixels.
        config: how often and how large.
        rng: key.
    """
    rows, _, height, width, _ = video.shape
    on_rng, area_rng, ratio_rng, y_rng, x_rng, noise_rng = jax.random.split(rng, 6)
    low, high = config.area
    area = jax.random.uniform(area_rng, (rows, _TRIES), minval=low, maxval=high) * height * width
    span = -math.log(config.ratio)
    ratio = jnp.exp(jax.random.uniform(ratio_rng, (rows, _TRIES), minval=-span, maxval=span))
    heights, widths = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    on = (jax.random.uniform(on_rng, (rows,)) < config.probability) & fits.any(axis=1)
    inside = [
        _placed(key, jnp.take_along_axis(sizes, first, axis=1)[:, 0], length)
        for key, sizes, length in ((y_rng, heights, height), (x_rng, widths, width))
    ]
    box = on[:, None, None] & inside[0][:, :, None] & inside[1][:, None, :]
    noise = jax.random.normal(noise_rng, video.shape, video.dtype)
    return jnp.where(box[:, None, :, :, None], noise, video)


def _placed(rng: jax.Array, size: jax.Array, length: int) -> jax.Array:
    """(B, length) bool: an interval of `size` anywhere within `length`."""
    start = jnp.floor(jax.random.uniform(rng, size.shape) * (length - size + 1))
    at = jnp.arange(length)
    return (at >= start[:, None]) & (at < (start + size)[:, None])
