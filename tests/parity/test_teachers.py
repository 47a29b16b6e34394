"""The teachers' towers against the original: features, pooled outputs, attention, intermediates."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax.core import meta

from iv2_jax.interop import torch_keys
from iv2_jax.models.positions import videomae_sinusoid
from iv2_jax.models.teachers.internvideo2 import InternVideo2Teacher
from iv2_jax.models.teachers.internvl import InternVLTeacher
from iv2_jax.models.teachers.videomae import (
    VideoMAE,
    VideoMAEAttention,
    VideoMAEConfig,
    VideoMAETeacher,
)
from iv2_jax.pixels import IMAGENET_MEAN, IMAGENET_STD
from tests.parity import goldens


def _pixels(video):
    """Undoes the normalisation that a teacher does itself: (B, T, H, W, 3) in 0..255."""
    return ((video * np.float64(IMAGENET_STD) + IMAGENET_MEAN) * 255).astype(np.float32)


def _last_layers(ctor, name):
    """Blocks that a constructor's list, or its count and interval, return; ascending."""
    listed = ctor.get(f"{name}_return_index")
    if listed is not None:
        return tuple(sorted(i % ctor["depth"] for i in listed))
    count, interval = ctor[f"{name}_return_layer"], ctor.get(f"{name}_return_interval", 1)
    return tuple(sorted(ctor["depth"] - int(i * interval) - 1 for i in range(count)))


def _encoder_teacher(case, cls, **sizes):
    """A teacher around the video encoder, and its parameters."""
    config = goldens.encoder_config(case.meta["ctor"] | sizes)
    teacher = cls(encoder=config, layers=_last_layers(case.meta["ctor"], "clip"))
    return teacher, torch_keys.from_torch(case.weights, torch_keys.encoder_map(config))


def _check(out, case, saliency):
    limit = goldens.OUTPUT_LIMIT
    goldens.assert_close(out.tokens, case.outputs["middle"], limit, "middle")
    goldens.assert_close(out.pooled, case.outputs["final"], limit, "final")
    goldens.assert_close(saliency, case.outputs["attn"], limit, "attention")


def test_internvl(golden):
    case = golden("t_internvl_clip")
    teacher, params = _encoder_teacher(case, InternVLTeacher, num_frames=1)
    frames, size = case.video.shape[1:3]
    out = jax.jit(teacher)(params, _pixels(case.video))
    _check(out, case, out.saliency.reshape(-1, out.saliency.shape[-1]))
    assert out.tokens.shape[2] == 1 + np.prod(teacher.grid(frames, size))
    assert out.saliency[0].size == np.prod(teacher.saliency_grid(frames, size))
    assert (teacher.width, teacher.num_layers) == (out.tokens.shape[3], out.tokens.shape[0])
    assert teacher.pooled_width == out.pooled.shape[1]


def test_internvl_pools_frames_before_scaling_to_unit_length(golden):
    # Scaling each frame first gives other numbers; the golden case tells the two apart.
    case = golden("t_internvl_clip")
    frames = case.video.shape[1]
    pooled = case.outputs["pooled"].reshape(-1, frames, case.outputs["pooled"].shape[-1])
    scaled_first = (pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)).mean(1)
    scaled_first /= np.linalg.norm(scaled_first, axis=-1, keepdims=True)
    assert goldens.relative_error(scaled_first, case.outputs["final"]) > 1e-4


def test_internvideo2(golden):
    case = golden("t_internvideo2_teacher")
    teacher, params = _encoder_teacher(case, InternVideo2Teacher)
    out = jax.jit(teacher)(params, _pixels(case.video))
    _check(out, case, out.saliency.reshape(len(case.video), -1))
    grid = teacher.grid(case.video.shape[1], case.video.shape[2])
    assert out.tokens.shape[2] == 1 + np.prod(grid)
    assert out.saliency.shape[1:] == (grid[0], grid[1] * grid[2])


def _videomae(case):
    """The model's config and parameters; the position table is no weight of ours."""
    ctor = case.meta["ctor"]
    config = VideoMAEConfig(
        width=ctor["embed_dim"],
        depth=ctor["depth"],
        num_heads=ctor["num_heads"],
        mlp_width=int(ctor["embed_dim"] * ctor["mlp_ratio"]),
        patch_size=ctor["patch_size"],
        tubelet=ctor["tubelet_size"],
        image_size=ctor["img_size"],
        num_frames=ctor["all_frames"],
        table_grid=(8, 14, 14),  # the recorded model resized the 1568-row table
    )
    ignore = {"pos_embed": "a fixed table"}
    return config, torch_keys.from_torch(
        case.weights, torch_keys.videomae_map(config), ignore=ignore
    )


@pytest.mark.parametrize("variant", ["intended", "as_written"])
def test_videomae(golden, variant):
    case = golden("t_videomae")
    config, params = _videomae(case)
    config = dataclasses.replace(config, released_attention=variant == "as_written")
    teacher = VideoMAETeacher(model=config, layers=_last_layers(case.meta["ctor"], "mae"))
    out = jax.jit(teacher)(params, _pixels(case.video))
    reference = {k.removeprefix(f"{variant}/"): v for k, v in case.outputs.items() if variant in k}
    goldens.assert_close(out.tokens, reference["features"], goldens.OUTPUT_LIMIT, "features")
    assert out.pooled is None
    assert out.saliency is None
    assert out.tokens.shape[2] == np.prod(teacher.grid(case.video.shape[1], case.video.shape[2]))

    run = jax.jit(VideoMAE(config).apply, static_argnums=2)
    blocks = run({"params": params}, case.video, (0, -1))
    goldens.assert_close(blocks[0], reference["block0"], goldens.OUTPUT_LIMIT, "block 0")
    goldens.assert_close(blocks[1], reference["final_norm"], goldens.OUTPUT_LIMIT, "norm")


def test_videomae_table_matches_the_recorded_one(golden):
    case = golden("t_videomae")
    config, _ = _videomae(case)
    table = videomae_sinusoid(config.width, config.grid, config.table_grid)
    goldens.assert_close(table[None], case.weights["pos_embed"], 1e-6, "position table")


def test_released_attention_is_the_literal_one():
    # Spec stage1 4.2, written out: o[n, h] = sum_g softmax_g(q[n, h].k[n, g] / sqrt(d)) v[n, g],
    # then row r, column c of the result holds head r // (N/h), token h*(r mod N/h) + c // d.
    heads, tokens, size = 3, 6, 4
    width = heads * size
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, tokens, width)).astype(np.float32)
    module = VideoMAEAttention(width, heads, True, VideoMAEConfig().precision)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(
        lambda v: rng.normal(size=v.shape).astype(np.float32), meta.unbox(abstract)
    )
    qkv = np.einsum("nc,cshd->snhd", x[0], params["qkv"]["kernel"])
    q, k, v = qkv[0] + params["q_bias"], qkv[1], qkv[2] + params["v_bias"]
    out = np.empty((tokens, width), np.float32)
    for row in range(tokens):
        for column in range(width):
            head = row // (tokens // heads)
            token = heads * (row % (tokens // heads)) + column // size
            scores = q[token, head] @ k[token].T * size**-0.5
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[row, column] = weights @ v[token, :, column % size]
    proj = params["proj"]
    expected = out @ proj["kernel"].reshape(width, width) + proj["bias"]
    got = jax.jit(module.apply)({"params": params}, x)[0]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
