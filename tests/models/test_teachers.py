"""Teachers: reading the released files' layouts, options, and what they refuse."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import torch_keys
from iv2_jax.models import teachers
from iv2_jax.models.layers import Precision
from iv2_jax.models.positions import resize_positions
from iv2_jax.models.teachers.base import resize_frames
from iv2_jax.models.teachers.internvideo2 import InternVideo2Teacher
from iv2_jax.models.teachers.internvl import InternVLTeacher
from iv2_jax.models.teachers.videomae import VideoMAEConfig, VideoMAETeacher
from iv2_jax.models.video_encoder import EncoderConfig

IMAGE = EncoderConfig(16, 2, 2, 24, image_size=28, num_frames=1, pool_heads=2, pool_width=8)
VIDEO = dataclasses.replace(IMAGE, num_frames=4)
MAE = VideoMAEConfig(
    width=12,
    depth=2,
    num_heads=2,
    mlp_width=20,
    patch_size=7,
    image_size=14,
    num_frames=4,
    table_grid=(2, 2, 2),
)


def _tensors(entries, seed=0):
    rng = np.random.default_rng(seed)
    shapes = torch_keys.torch_shapes(entries)
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def _save(path, tensors):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return str(path)


def _like_init(teacher, params):
    """Asserts that loaded parameters have the structure that plans and checkpoints assume."""
    abstract = jax.eval_shape(teacher.init, jax.random.key(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype.name), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype.name), abstract
    )


def test_internvl_inflates_its_image_kernel_and_leaves_the_text_side(tmp_path, caplog):
    tensors = _tensors(torch_keys.encoder_map(IMAGE))
    flat = dict(tensors)
    flat["patch_embed.proj.weight"] = flat["patch_embed.proj.weight"][:, :, 0]
    flat |= {"transformer.layers.0.weight": np.zeros(2, np.float32), "logit_scale": np.zeros(1)}
    teacher = InternVLTeacher(_save(tmp_path / "x.safetensors", flat), IMAGE, (-1,))
    with caplog.at_level("INFO"):
        params = teacher.load()
    assert "left out 2 keys" in caplog.text
    assert "InternVL's text side" in caplog.text
    _like_init(teacher, params)
    kernel = tensors["patch_embed.proj.weight"]
    np.testing.assert_array_equal(params["patch_embed"]["kernel"], kernel.transpose(2, 3, 4, 1, 0))


def test_internvl_still_refuses_a_misnamed_key_of_its_tower(tmp_path):
    tensors = _tensors(torch_keys.encoder_map(IMAGE))
    tensors["blocks.0.attn.extra.weight"] = np.zeros(1)
    teacher = InternVLTeacher(_save(tmp_path / "x.safetensors", tensors), IMAGE, (-1,))
    with pytest.raises(CheckpointError, match=r"1 unexpected:\n +blocks\.0\.attn\.extra"):
        teacher.load()


def test_videomae_takes_what_is_under_encoder(tmp_path):
    tensors = _tensors(torch_keys.videomae_map(MAE, key_prefix="encoder."))
    tensors["decoder.norm.weight"] = np.zeros(3, np.float32)
    teacher = VideoMAETeacher(_save(tmp_path / "x.safetensors", tensors), MAE, (-1,))
    params = teacher.load()
    _like_init(teacher, params)
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["encoder.norm.weight"])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_internvideo2_leaves_heads_and_stretches_positions(tmp_path, stage):
    shorter = dataclasses.replace(VIDEO, num_frames=2)
    prefix = "vision_encoder." if stage == "stage2" else ""
    tensors = _tensors(torch_keys.encoder_map(shorter, key_prefix=prefix))
    heads = {"clip_decoder.0.head.weight": np.zeros(2), "clip_pos_embed": np.zeros(2)}
    extra = {prefix + key: value for key, value in heads.items()}
    extra |= {"text_encoder.x": np.zeros(1)} if prefix else {}
    teacher = InternVideo2Teacher(
        _save(tmp_path / "x.safetensors", tensors | extra),
        VIDEO,
        (-1,),
        stage=stage,
        weights_frames=2,
    )
    params = teacher.load()
    _like_init(teacher, params)
    expected = resize_positions(tensors[f"{prefix}pos_embed"], (2, 2, 2), (4, 2, 2))
    np.testing.assert_allclose(params["pos_embed"], expected, rtol=1e-6)
    # Without being told of the other length, nothing is stretched behind one's back.
    with pytest.raises(CheckpointError, match="pos_embed is"):
        dataclasses.replace(teacher, weights_frames=None).load()


@pytest.mark.parametrize("name", ["internvl_6b", "videomaev2_g", "internvideo2_1b"])
def test_registered_teachers_have_the_released_sizes(name):
    teacher = teachers.get(name)
    width, layers, pooled, grid = {
        "internvl_6b": (3200, 6, 768, (8, 16, 16)),
        "videomaev2_g": (1408, 4, 0, (8, 16, 16)),
        "internvideo2_1b": (1408, 6, 768, (8, 16, 16)),
    }[name]
    frames = 16 if name == "videomaev2_g" else 8
    assert (teacher.width, teacher.num_layers, teacher.pooled_width) == (width, layers, pooled)
    assert teacher.grid(frames, 224) == grid
    abstract = jax.eval_shape(teacher.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    # Spec stage1 1; VideoMAE's table there is a fixed one, no parameter.
    assert (
        count
        == {
            "internvl_6b": 5_936_000_768,
            "videomaev2_g": 1_011_610_752,
            "internvideo2_1b": 1_020_708_608,
        }[name]
    )
    video = jax.ShapeDtypeStruct((2, frames, 224, 224, 3), jnp.uint8)
    out = jax.eval_shape(teacher, abstract, video)
    assert out.tokens.shape == (layers, 2, teacher.has_cls + 8 * 256, width)
    assert out.tokens.dtype == jnp.float32


def test_options_come_from_a_config():
    teacher = teachers.get(
        "internvl_6b",
        {"weights": "x.pth", "layers": [46, 47], "precision": {"compute_dtype": "bfloat16"}},
    )
    assert teacher.layers == (46, 47)
    assert teacher.encoder.precision == Precision(compute_dtype="bfloat16")
    with pytest.raises(ConfigError, match="layers"):
        teachers.get("internvl_6b", {"layers": [48]})
    with pytest.raises(ConfigError, match=r"weigths.*weights"):
        teachers.get("videomaev2_g", {"weigths": "x"})
    assert teachers.get("videomaev2_g", {"model": {"released_attention": True}}).model != MAE


@pytest.mark.parametrize("name", ["internvl_6b", "videomaev2_g", "internvideo2_1b"])
def test_weights_must_be_given_and_be_there(name):
    with pytest.raises(ConfigError, match=f"{name} needs its weights"):
        teachers.get(name).load()
    with pytest.raises(CheckpointError, match=re.escape("gone.pth")):
        teachers.get(name, {"weights": "gone.pth"}).load()


def test_the_image_tower_takes_one_frame():
    with pytest.raises(ConfigError, match=r"encoder\.num_frames=4"):
        InternVLTeacher(encoder=VIDEO, layers=(-1,))


def test_clips_of_another_length_are_refused():
    for teacher in (
        VideoMAETeacher(model=MAE, layers=(-1,)),
        InternVideo2Teacher(None, VIDEO, (-1,)),
    ):
        with pytest.raises(ConfigError, match=r"num_frames=4.*shown 8"):
            teacher.grid(8, 224)


def test_weights_are_shared_by_their_file_only():
    one, two = InternVLTeacher("a", IMAGE, (-1,)), InternVLTeacher("a", IMAGE, (-2,))
    assert one.weights_id == two.weights_id
    assert one.weights_id != InternVLTeacher("b", IMAGE, (-1,)).weights_id
    assert one.weights_id != InternVideo2Teacher("a", VIDEO, (-1,)).weights_id


def test_frames_of_another_size_are_resized_as_torch_does():
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    video = np.random.default_rng(0).normal(size=(1, 2, 20, 20, 3)).astype(np.float32)
    for size in (14, 33):
        ours = resize_frames(jnp.asarray(video), size)
        frames = torch.from_numpy(video[0].transpose(0, 3, 1, 2).copy())
        theirs = torch.nn.functional.interpolate(
            frames, size=(size, size), mode="bicubic", align_corners=False
        )
        np.testing.assert_allclose(
            ours[0], theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5
        )
    assert resize_frames(video, 20) is video


def test_videomae_normalises_only_the_last_block():
    first = VideoMAETeacher(model=MAE, layers=(-2,))
    both = VideoMAETeacher(model=MAE, layers=(-2, -1))
    entries = torch_keys.videomae_map(MAE)
    params = torch_keys.from_torch(_tensors(entries), entries)
    params["norm"]["scale"] = np.linspace(0.5, 2.0, MAE.width, dtype=np.float32)
    video = np.random.default_rng(1).uniform(0, 255, (1, 4, 14, 14, 3)).astype(np.float32)
    run = jax.jit(both)
    one, two = jax.jit(first)(params, video), run(params, video)
    np.testing.assert_allclose(two.tokens[0], one.tokens[0], rtol=1e-5, atol=1e-6)
    params["norm"]["scale"] = np.ones(MAE.width, np.float32)
    other = run(params, video)
    np.testing.assert_array_equal(other.tokens[0], two.tokens[0])
    assert np.abs(other.tokens[1] - two.tokens[1]).max() > 1e-2
