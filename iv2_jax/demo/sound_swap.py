"""Does a stage-2 model hear? Its loss on held-out clips with their own sound and with another's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SWAPS = 4


def swap_sounds(runs: Sequence[Path], *, trained: bool = True) -> list[dict[str, float]] | None:
    """Gives held-out clips each other's sound and looks at the contrast of both with the text.

    Args:
      runs: Workdirs of stage-2 runs of one config, whose `eval_data` are audio_video.
      trained: Their newest checkpoint, else the weights that they started with.

    Returns:
      For each run: `own` and `swapped`, the AVTC loss over all clips with sound; `atc_own` and
      `atc_swapped`, likewise of the sound alone; `worse`, the share of clips and swaps whose cosine
      with their text falls; `clips`. None if fewer than two clips have sound and a caption.
    """
    from iv2_jax.eval import model_runs, retrieval_task

    results = []
    for run in runs:
        load = model_runs.load_model if trained else model_runs.at_step_0
        model = load(str(run))
        with retrieval_task.open_loader(model.data, 16, seed=0) as batches:
            joint = _encode(model, batches)
        if len(joint["text"]) < 2:
            return None
        results.append(_compare(model, joint))
    return results


def shifts(clips: int, swaps: int = SWAPS) -> list[int]:
    """How far down the list each clip's sound comes from: spread, and never from the clip itself.

    Clips of one game stand together in the list, so that nearly all sounds are of another.
    """
    spread = {round(clips * (i + 1) / (swaps + 1)) for i in range(swaps)}
    return sorted(shift for shift in spread if 0 < shift < clips)


def _encode(model: Any, batches: Any) -> dict[str, np.ndarray]:
    """Joint vectors of the clips that have sound and a caption, by kind: video, audio, text."""
    rows: dict[str, list[np.ndarray]] = {"video": [], "audio": [], "text": []}
    caption = f"text_{model.data.text.captions[0]}"
    encode = _encoder(model.config)
    for batch in batches:
        keep = batch["valid"] & batch["has_audio"] & batch[caption].any(axis=1)
        if keep.any():
            encoded = encode(model.params, batch["video"], batch["fbank"], batch[caption])
            for name, values in encoded.items():
                rows[name].append(np.asarray(values)[keep])
    return {name: np.concatenate(values or [np.zeros((0, 1))]) for name, values in rows.items()}


@functools.lru_cache(maxsize=2)
def _encoder(config: Any) -> Any:
    """A compiled (params, video, fbank, ids) -> joint vectors of each."""
    import jax

    from iv2_jax.models.stage2 import Stage2

    def encode(model: Stage2, video: Any, fbank: Any, ids: Any) -> dict[str, jax.Array]:
        pixels = config.vision.encoder.normalize(video)
        return {
            "video": model.encode_vision(pixels).joint,
            "audio": model.encode_audio(fbank).joint,
            "text": model.encode_text(ids, (ids != 0).astype("int32")).joint,
        }

    return jax.jit(
        lambda params, *arrays: Stage2(config).apply({"params": params}, *arrays, method=encode)
    )


def _compare(model: Any, joint: dict[str, np.ndarray]) -> dict[str, float]:
    """Losses and cosines with own and swapped sound."""
    import jax
    import jax.numpy as jnp

    from iv2_jax.models.stage2 import Stage2
    from iv2_jax.objectives.contrastive import contrastive_loss

    video, audio, text = (jnp.asarray(joint[name]) for name in ("video", "audio", "text"))
    ids = jnp.arange(len(text))

    @jax.jit
    def judge(params: Any, audio: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        both = Stage2(model.config).apply(
            {"params": params}, audio, video, method=Stage2.fuse_joint
        )
        cosine = jnp.sum(both * text, axis=1) / (
            jnp.linalg.norm(both, axis=1) * jnp.linalg.norm(text, axis=1)
        )
        losses = (contrastive_loss(x, text, params["temp"], ids) for x in (both, audio))
        return (*losses, cosine)

    avtc, atc, own = judge(model.params, audio)
    swapped = [judge(model.params, jnp.roll(audio, shift, axis=0)) for shift in shifts(len(text))]
    return {
        "own": float(avtc),
        "swapped": float(np.mean([s[0] for s in swapped])),
        "atc_own": float(atc),
        "atc_swapped": float(np.mean([s[1] for s in swapped])),
        "worse": float(np.mean([np.asarray(s[2]) < np.asarray(own) for s in swapped])),
        "clips": len(text),
    }
