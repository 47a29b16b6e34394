"""Teacher outputs as flat named arrays, to be stored by clip and read back in batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from iv2_jax.models.teachers.base import TeacherOutput


def pack(outputs: Mapping[str, TeacherOutput]) -> dict[str, jax.Array]:
    """What is stored of a batch's outputs: float16 arrays with the batch in front.

    Saliency is scaled to a mean of one by clip: masks follow from its ratios, and it must fit.

    Args:
        outputs: role -> output.

    Returns:
        `{role}_tokens` (B, K, N, C) and, where there are such, `{role}_pooled` (B, C') and
        `{role}_saliency` (B, T', H'*W').
    """
    arrays = {}
    for role, output in outputs.items():
        arrays[f"{role}_tokens"] = output.tokens.swapaxes(0, 1)
        if output.pooled is not None:
            arrays[f"{role}_pooled"] = output.pooled
        if output.saliency is not None:
            mean = jnp.mean(output.saliency, axis=(1, 2), keepdims=True)
            arrays[f"{role}_saliency"] = output.saliency / jnp.maximum(mean, 1e-12)
    return {name: value.astype(jnp.float16) for name, value in arrays.items()}


def unpack(batch: Mapping[str, jax.Array], roles: Iterable[str]) -> dict[str, TeacherOutput]:
    """The outputs of some roles, float32, from a batch with the arrays of `pack`."""

    def given(role: str, name: str) -> jax.Array | None:
        value = batch.get(f"{role}_{name}")
        return None if value is None else value.astype(jnp.float32)

    return {
        role: TeacherOutput(
            tokens=given(role, "tokens").swapaxes(0, 1),
            pooled=given(role, "pooled"),
            saliency=given(role, "saliency"),
        )
        for role in roles
    }
