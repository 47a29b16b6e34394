"""What a file really is, and what the import says when it is not what was asked for."""

from __future__ import annotations

import jax
import pytest
from safetensors.numpy import save_file

from iv2_jax.errors import CheckpointError
from iv2_jax.interop import entries, families, identify, importing
from iv2_jax.models import zoo
from tests.interop.family_cases import random_params


def _abstract(name, prefix=""):
    """The tensors of a file of a model, without values."""
    config = zoo.get(name)
    table = families.of(config).entries(config)
    shapes = entries.torch_shapes(table)
    return {f"{prefix}{k}": jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}


@pytest.mark.parametrize(
    "name",
    [
        "internvideo2_large_distill",
        "internvideo2_6b_pretrain",
        "internvideo2_1b",
        "internvideo2_stage2_6b",
        "internvideo2_clip_base",
        "internvideo2_chat_8b",
        "mistral_7b",
        "beats_iter3",
        "transnetv2",
    ],
)
def test_a_whole_file_is_known_by_its_name(name):
    best = identify.identify(_abstract(name))[0]
    assert best.name == name
    assert best.score == 1.0
    assert f"a whole {name}" in identify.explain(_abstract(name))


def test_another_size_is_named():
    text = identify.explain(_abstract("internvideo2_large_distill"), "internvideo2_small_distill")
    assert text.startswith("the file is a whole internvideo2_large_distill (video encoder")
    assert text.endswith("; you asked for internvideo2_small_distill")


def test_other_frames_are_told_from_other_models():
    tensors = _abstract("internvideo2_1b_k400_f8")
    tensors["pos_embed"] = jax.ShapeDtypeStruct((1, 1 + 4 * 256, 1408), "float32")
    text = identify.explain(tensors)
    assert "most like internvideo2_1b_k400_f8" in text
    assert "another number of frames" in text


def test_a_prefix_is_found():
    tensors = _abstract("internvideo2_1b", "vision_encoder.")
    best = identify.identify(tensors)[0]
    assert (best.name, best.prefix) == ("internvideo2_1b", "vision_encoder.")
    assert "--prefix vision_encoder. takes it off" in identify.explain(tensors, "internvideo2_1b")


def test_strangers_are_not_named():
    stranger = {f"layer{i}.conv.weight": jax.ShapeDtypeStruct((3, 3), "f4") for i in range(20)}
    assert identify.explain(stranger, "internvideo2_1b") == ""


def test_the_import_says_what_the_file_is_and_writes_nothing(tmp_path):
    config = zoo.get("test_tiny_clip_small")
    table = families.of(config).entries(config)
    tensors = entries.to_torch(random_params(config), table)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as error:
        importing.import_model(tmp_path / "x.safetensors", "test_tiny_pretrain", tmp_path / "out")
    text = str(error.value)
    assert "missing" in text
    assert "unexpected" in text
    assert "the file is a whole test_tiny_clip_small (CLIP, small" in text
    assert "you asked for test_tiny_pretrain" in text
    assert not (tmp_path / "out").exists()
