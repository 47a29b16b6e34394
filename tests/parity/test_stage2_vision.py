"""The stage-2 vision encoder, which is a student that also takes images, against the original."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from iv2_jax import config as config_lib
from iv2_jax.interop import recipes
from iv2_jax.models.masking import mask_to_visible
from iv2_jax.models.student import Student
from iv2_jax.models.video_encoder import VideoEncoder
from tests.parity import goldens


@pytest.fixture(scope="module", params=["s2_vit_joint_pos", "s2_vit_sep_image_pos"])
def case(request, golden):
    return golden(request.param)


def _inputs(case, name):
    """Channels-last input and mask (or None) of `video_masked` and the like."""
    kind, masked = name.split("_")
    mask = case.inputs["mask" if kind == "video" else "image_mask"]
    return case.inputs[kind].transpose(0, 2, 3, 4, 1), mask if masked == "masked" else None


@pytest.mark.parametrize("name", ["video_masked", "video_full", "image_masked", "image_full"])
def test_outputs(case, name):
    config = goldens.student_config(case)
    params = goldens.student_params(case, config)
    video, mask = _inputs(case, name)
    visible = None if mask is None else mask_to_visible(mask)
    out = jax.jit(Student(config).apply)({"params": params}, video, visible)
    for ours, reference in (
        (out.tokens, "tokens"),
        (out.pooled, "pooled"),
        (out.clip, "clip_middle"),
        (out.final, "clip_final"),
    ):
        wanted = case.outputs[f"{name}/{reference}"]
        goldens.assert_close(ours, wanted, goldens.OUTPUT_LIMIT, f"{name}/{reference}")


def test_encoder_cut_off_early(case):
    """Leaving out the last block and the pool is what `x_vis_return_idx=-2` does."""
    config = goldens.student_config(case).encoder
    params = goldens.student_params(case, goldens.student_config(case))["encoder"]
    cut = dataclasses.replace(config, depth=config.depth - 1, pool=False)
    params = recipes.cut_encoder(params, config, cut)
    video, _ = _inputs(case, "video_full")
    out = jax.jit(VideoEncoder(cut).apply)({"params": params}, video)
    wanted = case.outputs["video_full/tokens_return_idx_minus2"]
    goldens.assert_close(out.tokens, wanted, goldens.OUTPUT_LIMIT, "tokens")
    assert out.pooled is None


@pytest.mark.torch
@pytest.mark.parametrize("name", ["video_masked", "video_full", "image_masked", "image_full"])
def test_torch_outputs(case, name):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import video as torch_models

    config = goldens.student_config(case)
    model = torch_models.from_config({"kind": "student", "model": config_lib.to_dict(config)})
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in case.weights.items()})
    video, mask = _inputs(case, name)
    video = torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())
    with torch.no_grad():
        out = model(video, None if mask is None else torch.from_numpy(mask.copy()))
    for ours, reference in (
        (out.tokens, "tokens"),
        (out.pooled, "pooled"),
        (out.clip, "clip_middle"),
        (out.final, "clip_final"),
    ):
        wanted = case.outputs[f"{name}/{reference}"]
        goldens.assert_close(ours, wanted, goldens.OUTPUT_LIMIT, f"{name}/{reference}")
