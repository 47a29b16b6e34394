"""The key maps: names and shapes of the original, exact inverses, and every kind of misfit."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from flax.core import meta
from hypothesis import given, settings
from hypothesis import strategies as st

from iv2_jax.errors import CheckpointError
from iv2_jax.interop import families, torch_keys
from iv2_jax.models import zoo
from iv2_jax.models.student import AlignmentConfig, StudentConfig
from iv2_jax.models.teachers.internvl import INTERNVL_6B
from iv2_jax.models.teachers.videomae import VideoMAEConfig, VideoMAETeacher
from iv2_jax.models.video_encoder import EncoderConfig
from tests.interop.family_cases import check_round_trip, random_tree

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests"


SIZES = {"S": "small", "B": "base", "L": "large", "1B": "1b", "6B": "6b"}


def _entries(name):
    """Entries of the model that a manifest of the original lists."""
    _, kind, *_, size = name.split("_")
    if name == "single_teacher_videomaev2_g":
        return torch_keys.videomae_map(VideoMAEConfig())
    if name == "single_teacher_internvl_clip_6b":
        return torch_keys.encoder_map(INTERNVL_6B)
    if kind == "teacher":
        return torch_keys.encoder_map(zoo.get(f"internvideo2_{SIZES[size]}"))
    return torch_keys.student_map(zoo.get(f"internvideo2_{SIZES[size]}_{kind}"))


VIDEO = sorted(MANIFESTS.glob("single_[dpt]*.json.gz"))  # distill, pretrain, teacher


@pytest.mark.parametrize("path", VIDEO, ids=lambda p: p.name)
def test_keys_and_shapes_are_the_originals(path):
    manifest = json.loads(gzip.decompress(path.read_bytes()))
    ours = torch_keys.torch_shapes(_entries(path.name.removesuffix(".json.gz")))
    assert ours == {key: tuple(shape) for key, (shape, _) in manifest.items()}


def test_all_nine_manifests_are_there():
    assert len(VIDEO) == 9


def _shapes(tree):
    flat = traverse_util.flatten_dict(meta.unbox(tree), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


_CLASSES = {family.kind.config.split(":")[1] for family in families.FAMILIES.values()}


@pytest.mark.parametrize("name", [n for n in zoo.names() if type(zoo.get(n)).__name__ in _CLASSES])
def test_paths_and_shapes_are_our_models(name):
    config = zoo.get(name)
    entries = families.of(config).entries(config)
    assert _shapes(zoo.abstract_params(config)) == _shapes(torch_keys.abstract_params(entries))


TINY = EncoderConfig(
    32, 3, 4, 40, image_size=28, num_frames=2, pool_heads=2, pool_width=24, qkv_bias=True
)


@st.composite
def _students(draw):
    """Small students of every shape that changes the key map."""
    heads, head_dim = draw(st.sampled_from([(2, 8), (3, 16), (1, 16)]))
    separable = draw(st.booleans())
    tubelet = draw(st.integers(1, 2))
    encoder = EncoderConfig(
        width=heads * head_dim,
        depth=draw(st.integers(1, 3)),
        num_heads=heads,
        mlp_width=draw(st.integers(1, 9)),
        patch_size=draw(st.integers(1, 3)),
        tubelet=tubelet,
        image_size=6,
        num_frames=2 * tubelet,
        pool_heads=draw(st.sampled_from([1, 4, 8])),
        pool_width=draw(st.integers(1, 7)),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        separable_positions=separable,
    )

    def branch(has_cls):
        count = draw(st.integers(0, encoder.depth))
        decoder = draw(st.sampled_from(["linear", "mlp"]))
        width = draw(st.integers(1, 7))
        layers = tuple(range(encoder.depth - count, encoder.depth))
        return AlignmentConfig(width, layers, decoder, has_cls) if count else None

    decoder = draw(st.sampled_from(["linear", "mlp"]))
    return StudentConfig(encoder, branch(True), branch(False), draw(st.integers(0, 5)), decoder)


@settings(max_examples=30, deadline=None)
@given(config=_students())
def test_round_trip_is_the_identity(config):
    entries = torch_keys.student_map(config)
    params = random_tree(entries)
    check_round_trip(params, entries)


def test_videomae_round_trip_and_paths():
    config = VideoMAEConfig(
        width=24, depth=2, num_heads=3, mlp_width=7, patch_size=4, image_size=8, num_frames=4
    )
    entries = torch_keys.videomae_map(config, key_prefix="encoder.")
    params = random_tree(entries)
    tensors = torch_keys.to_torch(params, entries)
    assert all(key.startswith("encoder.") for key in tensors)
    jax.tree.map(np.testing.assert_array_equal, params, torch_keys.from_torch(tensors, entries))
    teacher = VideoMAETeacher(model=config, layers=(-1,))
    assert _shapes(jax.eval_shape(teacher.init, jax.random.key(0))) == _shapes(params)


def test_layouts_put_each_value_where_the_original_has_it():
    entries = torch_keys.encoder_map(TINY)
    params = random_tree(entries)
    tensors = torch_keys.to_torch(params, entries)
    qkv = params["blocks"]["attn"]["qkv"]
    # Rows are [q | k | v], each by head, then by feature of the head (spec stage1 2.4 and 8).
    row = 1 * 32 + 2 * 8 + 5
    np.testing.assert_array_equal(
        tensors["blocks.1.attn.qkv.weight"][row], qkv["kernel"][1, :, 1, 2, 5]
    )
    assert tensors["blocks.2.attn.qkv.bias"][row] == qkv["bias"][2, 1, 2, 5]
    proj = params["blocks"]["attn"]["proj"]["kernel"]
    np.testing.assert_array_equal(tensors["blocks.0.attn.proj.weight"][:, 2 * 8 + 5], proj[0, 2, 5])
    patch = params["patch_embed"]["kernel"]
    assert tensors["patch_embed.proj.weight"][7, 2, 0, 4, 9] == patch[0, 4, 9, 2, 7]
    pool = params["pool"]
    np.testing.assert_array_equal(
        tensors["clip_projector.cross_attn.v.weight"][16 + 3], pool["v"]["kernel"][:, 1, 3]
    )
    assert tensors["clip_projector.cross_attn.k_bias"][16 + 3] == pool["k"]["bias"][1, 3]


def test_bfloat16_and_a_wanted_dtype():
    entries = torch_keys.encoder_map(TINY)
    tensors = torch_keys.to_torch(random_tree(entries, dtype=jnp.bfloat16), entries)
    assert tensors["cls_token"].dtype == jnp.bfloat16
    assert torch_keys.from_torch(tensors, entries)["cls_token"].dtype == jnp.bfloat16
    assert torch_keys.from_torch(tensors, entries, dtype=np.float32)["cls_token"].dtype == "float32"


def test_abstract_arrays_go_both_ways():
    entries = torch_keys.student_map(zoo.get("internvideo2_6b_pretrain"))
    params = torch_keys.abstract_params(entries, jnp.bfloat16)
    tensors = torch_keys.to_torch(params, entries)
    assert tensors["blocks.47.mlp.fc1.weight"].shape == (12800, 3200)
    back = torch_keys.from_torch(tensors, entries)
    assert back == params


@pytest.fixture
def tiny():
    """Entries and a state dict that fits them."""
    entries = torch_keys.encoder_map(TINY)
    return entries, torch_keys.to_torch(random_tree(entries), entries)


def test_missing_key(tiny):
    entries, tensors = tiny
    del tensors["blocks.1.ls2.gamma"]
    with pytest.raises(CheckpointError, match=r"1 missing:\n +blocks\.1\.ls2\.gamma"):
        torch_keys.from_torch(tensors, entries)


def test_renamed_key_is_named_with_its_nearest(tiny):
    entries, tensors = tiny
    tensors["blocks.1.mlp.fc_1.weight"] = tensors.pop("blocks.1.mlp.fc1.weight")
    with pytest.raises(CheckpointError) as error:
        torch_keys.from_torch(tensors, entries, source="weights.pth")
    text = str(error.value)
    assert text.startswith("weights.pth does not fit the model")
    assert "blocks.1.mlp.fc1.weight (nearest: blocks.1.mlp.fc_1.weight)" in text
    assert "blocks.1.mlp.fc_1.weight (nearest: blocks.1.mlp.fc1.weight)" in text


def test_transposed_weight(tiny):
    entries, tensors = tiny
    tensors["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"].T
    with pytest.raises(CheckpointError) as error:
        torch_keys.from_torch(tensors, entries)
    assert "blocks.0.mlp.fc1.weight is (32, 40), the model wants (40, 32)" in str(error.value)
    assert "it looks transposed" in str(error.value)


def test_another_width_lists_ten_and_says_so(tiny):
    _, tensors = tiny
    wider = EncoderConfig(64, 3, 4, 40, image_size=28, num_frames=2, pool_heads=2, pool_width=24)
    with pytest.raises(CheckpointError) as error:
        torch_keys.from_torch(tensors, torch_keys.encoder_map(wider))
    text = str(error.value)
    assert "3 unexpected" in text  # the three qkv biases
    listed = re.findall(r" is \(.*the model wants", text)
    assert len(listed) == 10
    assert re.search(r"\.\.\. and \d+ more", text)
    assert "model of another size" in text


def test_only_named_keys_are_ignored(tiny, caplog):
    entries, tensors = tiny
    extra = tensors | {"head.weight": np.zeros(3), "head.bias": np.zeros(3), "ahead": np.zeros(1)}
    with caplog.at_level("INFO"), pytest.raises(CheckpointError) as error:
        torch_keys.from_torch(extra, entries, ignore={r"head\..*": "classifier"})
    assert "1 unexpected:\n    ahead" in str(error.value)
    assert "left out 2 keys" in caplog.text
    assert "classifier" in caplog.text


def test_a_wanted_key_is_never_ignored(tiny):
    entries, tensors = tiny
    got = torch_keys.from_torch(tensors, entries, ignore={".*": "everything"})
    np.testing.assert_array_equal(got["cls_token"], tensors["cls_token"])


def test_our_own_parameters_are_checked_too(tiny):
    entries, _ = tiny
    params = random_tree(entries)
    params["blocks"]["norm3"] = params["blocks"].pop("norm2")
    params["cls_token"] = np.zeros((1, 32))
    with pytest.raises(CheckpointError) as error:
        torch_keys.to_torch(params, entries)
    text = str(error.value)
    assert "blocks/norm2/scale (nearest: blocks/norm3/scale)" in text
    assert "cls_token is (1, 32), the model wants (1, 1, 32)" in text


def test_boxed_parameters_are_unboxed(tiny):
    entries, tensors = tiny
    boxed = random_tree(entries)
    boxed["cls_token"] = nn.LogicallyPartitioned(boxed["cls_token"], (None, None, "embed"))
    got = torch_keys.to_torch(boxed, entries)
    np.testing.assert_array_equal(got["cls_token"], tensors["cls_token"])
