"""Features of a frozen encoder for a list of clips."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder


@functools.lru_cache(maxsize=8)
def _encode(config: EncoderConfig) -> Any:
    """A compiled (params, video) -> features function for one encoder shape."""
    model = VideoEncoder(config)

    @jax.jit
    def encode(params: Any, video: jax.Array) -> dict[str, jax.Array]:
        output = model.apply({"params": params}, config.normalize(video))
        frames, height, width = config.grid
        patches = output.tokens[:, 1:].reshape(len(video), frames, height * width, -1)
        by_frame = patches.astype(jnp.float32).mean(axis=2)
        return {
            "pooled": output.pooled.astype(jnp.float32),
            "mean": by_frame.mean(axis=1),
            "frames": by_frame.reshape(len(video), -1),
        }

    return encode


def extract(
    params: Mapping[str, Any],
    config: EncoderConfig,
    batches: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Runs the encoder on every patch (no mask) of each clip.

    Args:
      params: The encoder's parameters.
      config: Its shape.
      batches: Evaluation batches with `video` (B, T, H, W, 3) uint8, `index` (B,) and, where the
        last one is filled up, `valid` (B,).

    Returns:
      Arrays with one row a clip, sorted by `index`:
        index  (n,) int, position in the list of clips
        pooled (n, pool_width), the attention-pooled feature
        mean   (n, width), tokens averaged over space and time
        frames (n, T' * width), tokens averaged over space, frames kept apart, which is what the
               original's probe of motion-heavy sets reads (cls_avgN, spec stage1 2.9)
    """
    encode = _encode(config)
    rows: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        keep = np.asarray(batch.get("valid", np.ones(len(batch["index"]), bool)))
        out = {k: np.asarray(v)[keep] for k, v in encode(params, batch["video"]).items()}
        for name, values in {"index": np.asarray(batch["index"])[keep], **out}.items():
            rows.setdefault(name, []).append(values)
    features = {name: np.concatenate(values) for name, values in rows.items()}
    order = np.argsort(features["index"], kind="stable")
    return {name: values[order] for name, values in features.items()}
