"""Shapes of the device arrays that a loader's settings give, for compiling ahead."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from iv2_jax.data import row_sounds
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.mixing import MIXED, MixConfig
from iv2_jax.data.modalities import WITH_PICTURES, WITH_SOUND


def abstract_batch(data: DataConfig, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays of a training batch of one media type.

    Args:
        data: the loader's settings.
        rows: rows of the global batch.

    Returns:
        Name -> shape and dtype, bookkeeping left out.
    """

    def array(*shape: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    batch = {}
    if data.media in WITH_PICTURES:
        views = (data.num_views,) if data.num_views > 1 else ()
        batch["video"] = array(*views, data.frames, data.size, data.size, 3, dtype=jnp.uint8)
    if data.media in WITH_SOUND:
        batch["fbank"] = array(*row_sounds.feature_shape(data.audio), dtype=jnp.float32)
        batch["has_audio"] = array(dtype=jnp.bool_)
    if data.text is not None:
        batch["match_id"] = array(dtype=jnp.int32)
        for caption in data.text.captions:
            batch[f"text_{caption}"] = array(data.text.max_length, dtype=jnp.int32)
    return batch


def abstract_batches(mix: MixConfig, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Arrays of the batches of every media type, by media type; one for a padded mix."""
    each = {
        media: abstract_batch(data, mix.batch_sizes.get(media, batch_size))
        for media, data in mix.media.items()
    }
    if mix.mode == "alternate":
        return each
    union: dict[str, jax.ShapeDtypeStruct] = {}
    for arrays in each.values():
        for name, x in arrays.items():
            shape = union[name].shape if name in union else x.shape
            longest = tuple(map(max, zip(shape, x.shape, strict=True)))  # images become clips
            union[name] = jax.ShapeDtypeStruct(longest, x.dtype)
    if "video" in union:
        union["has_video"] = jax.ShapeDtypeStruct((batch_size,), jnp.bool_)
    return {MIXED: union}
