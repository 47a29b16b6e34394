"""CLIP: the original's names and shapes, exact round trips, and models put together from parts."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import clip_recipes, torch_keys
from iv2_jax.interop.torch_keys.clip import (
    IGNORABLE,
    clip_delta_map,
    clip_map,
    llama_clip_map,
    mobileclip_map,
)
from iv2_jax.interop.torch_keys.video import encoder_map
from iv2_jax.models import positions, zoo
from iv2_jax.models.clip import ZOO, Clip
from iv2_jax.models.lora import LoraConfig
from tests.interop.family_cases import check_round_trip, random_tree

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests" / "clip"
TINY, SMALL = ZOO["test_tiny_clip"], ZOO["test_tiny_clip_small"]
LORA = LoraConfig(rank=3, alpha=6.0)
ADAPTED = dataclasses.replace(TINY, text=TINY.text.with_lora(LORA))
RECIPE = {"lora": LORA, "targets": ("q", "v")}


def _with_default_lora(config):
    return dataclasses.replace(config, text=config.text.with_lora())


WHOLE = {
    "multi_clip_1B": ZOO["internvideo2_clip_1b"],
    "multi_clip_6B": ZOO["internvideo2_clip_6b"],
    "multi_clip_1B_peft013_lora": _with_default_lora(ZOO["internvideo2_clip_1b"]),
    "multi_clip_6B_peft013_lora": _with_default_lora(ZOO["internvideo2_clip_6b"]),
    "multi_clip_small_S14": ZOO["internvideo2_clip_small"],
    "multi_clip_small_B14": ZOO["internvideo2_clip_base"],
    "multi_clip_small_L14": ZOO["internvideo2_clip_large"],
}
DELTAS = {
    "multi_clip_1B_released_delta_inferred": ZOO["internvideo2_clip_1b"],
    "multi_clip_6B_released_delta_inferred": ZOO["internvideo2_clip_6b"],
}


def _manifest(name):
    manifest = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, (shape, _) in manifest.items()}


def _abstract(shapes, dtype=jnp.bfloat16):
    return {key: jax.ShapeDtypeStruct(shape, dtype) for key, shape in shapes.items()}


def _paths(tree):
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize("name", WHOLE)
def test_keys_and_shapes_are_the_originals(name):
    assert torch_keys.torch_shapes(clip_map(WHOLE[name])) == _manifest(name)


@pytest.mark.parametrize("name", DELTAS)
def test_the_released_delta_has_its_keys_and_shapes(name):
    manifest = _manifest(name)
    entries = clip_delta_map(DELTAS[name])
    assert len(manifest) == 47
    assert torch_keys.torch_shapes(entries) == manifest
    params = torch_keys.from_torch(_abstract(manifest), entries)
    assert set(params) == {"temp", "vision_encoder"}


def test_every_clip_manifest_is_tested(shared_dir):
    theirs = {path.stem for path in (shared_dir / "manifests").glob("multi_clip*.json")}
    assert theirs == WHOLE.keys() | DELTAS.keys()
    for name in theirs:
        assert _manifest(name) == {
            key: tuple(shape)
            for key, (shape, _) in json.loads(
                (shared_dir / "manifests" / f"{name}.json").read_text()
            ).items()
        }


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_with_the_originals_keys_is_read_whole(name):
    params = torch_keys.from_torch(_abstract(_manifest(name)), clip_map(WHOLE[name]))
    assert _paths(params) == _paths(zoo.abstract_params(WHOLE[name]))


@pytest.mark.parametrize("config", [TINY, ADAPTED, SMALL], ids=["llama", "lora", "small"])
def test_round_trip_is_the_identity_and_paths_are_the_models(config):
    entries = clip_map(config)
    params = random_tree(entries)
    check_round_trip(params, entries)
    assert _paths(params) == _paths(zoo.abstract_params(config))


def test_layouts_put_each_value_where_the_original_has_it():
    entries = clip_map(ADAPTED)
    params = random_tree(entries)
    tensors = torch_keys.to_torch(params, entries)
    attention = params["text_encoder"]["decoder"]["blocks"]["attn"]
    key = "text_encoder.transformer.layers.1.self_attn.q_proj"
    row = 2 * 8 + 5  # head 2, feature 5 of the head
    np.testing.assert_array_equal(
        tensors[f"{key}.base_layer.weight"][row], attention["q"]["kernel"][1, :, 2, 5]
    )
    np.testing.assert_array_equal(
        tensors[f"{key}.lora_B.default.weight"][row], attention["q"]["lora_b"][1, :, 2, 5]
    )
    np.testing.assert_array_equal(
        tensors["text_encoder.text_projection"], params["text_encoder"]["proj"]["kernel"]
    )
    assert tensors["temp"].shape == ()

    entries = clip_map(SMALL)
    params = random_tree(entries)
    tensors = torch_keys.to_torch(params, entries)
    # The two blocks have MLPs of different sizes, so each is a stack of its own.
    qkv = params["text_encoder"]["blocks_1"]["attn"]["qkv"]["kernel"]
    row = 2 * 32 + 1 * 16 + 3  # value, head 1, feature 3 of the head
    np.testing.assert_array_equal(
        tensors["text_encoder.transformer.1.pre_norm_mha.1.qkv_proj.weight"][row],
        qkv[0, :, 2, 1, 3],
    )


def test_rotary_buffers_and_a_language_head_are_left_out():
    entries = clip_map(TINY)
    tensors = torch_keys.to_torch(random_tree(entries), entries)
    layer = "text_encoder.transformer.layers.0.self_attn.rotary_emb.inv_freq"
    extra = tensors | {layer: np.ones(4), "text_encoder.transformer.lm_head.weight": np.ones(3)}
    torch_keys.from_torch(extra, entries, ignore=IGNORABLE)
    with pytest.raises(CheckpointError, match=r"text_encoder\.transformer\.extra"):
        torch_keys.from_torch(
            tensors | {"text_encoder.transformer.extra": np.ones(1)}, entries, ignore=IGNORABLE
        )


def test_the_delta_of_a_model_is_what_a_release_holds():
    params = random_tree(clip_map(TINY))
    delta = clip_recipes.clip_delta(params, TINY)
    assert {key: v.shape for key, v in delta.items()} == torch_keys.torch_shapes(
        clip_delta_map(TINY)
    )
    whole = torch_keys.to_torch(params, clip_map(TINY))
    buffers = {key for key in delta if key.endswith("inv_freq")}
    assert len(buffers) == 2
    for key in delta.keys() - buffers:
        np.testing.assert_array_equal(delta[key], whole[key])
    np.testing.assert_allclose(delta[min(buffers)], [1, 1e-1, 1e-2, 1e-3], rtol=1e-6)


# Adapters


def _old_names(tensors, *, oldest):
    """The names that peft gave before 0.6, or in its first versions."""
    renamed = {key.replace(".base_layer", ""): value for key, value in tensors.items()}
    if oldest:
        renamed = {key.replace(".default", ""): value for key, value in renamed.items()}
    return renamed


@pytest.mark.parametrize("oldest", [False, True])
def test_old_names_of_adapters_become_new_ones(oldest):
    tensors = torch_keys.to_torch(random_tree(clip_map(ADAPTED)), clip_map(ADAPTED))
    old = _old_names(tensors, oldest=oldest)
    assert old.keys() != tensors.keys()
    new = clip_recipes.modern_peft_names(old)
    assert new.keys() == tensors.keys()
    assert all(new[key] is tensors[key] for key in tensors)
    if not oldest:
        assert torch_keys.torch_shapes(clip_map(ADAPTED, peft="old")).keys() == old.keys()


def test_names_without_adapters_stay():
    tensors = torch_keys.to_torch(random_tree(clip_map(TINY)), clip_map(TINY))
    assert clip_recipes.modern_peft_names(tensors) is tensors


@pytest.mark.parametrize("names", ["new", "old"])
def test_folded_adapters_give_the_same_model(names):
    params = random_tree(clip_map(ADAPTED))
    params = jax.tree.map(lambda leaf: 0.2 * leaf, params)
    tensors = torch_keys.to_torch(params, clip_map(ADAPTED, peft=names))
    folded = clip_recipes.clip_from_lora(tensors, TINY, **RECIPE)
    ids = np.array([[5, 9, 2, 0, 0]])

    def text(config, params):
        return Clip(config).apply({"params": params}, ids, method="encode_text").pooled

    np.testing.assert_allclose(text(TINY, folded), text(ADAPTED, params), rtol=2e-5, atol=2e-5)
    plain = clip_recipes.clip_from_lora(
        {key: np.zeros_like(v) if "lora_" in key else v for key, v in tensors.items()},
        TINY,
        **RECIPE,
    )
    assert np.abs(text(TINY, folded) - text(TINY, plain)).max() > 1e-3


def test_a_file_with_adapters_is_not_taken_for_one_without():
    tensors = torch_keys.to_torch(random_tree(clip_map(ADAPTED)), clip_map(ADAPTED))
    with pytest.raises(CheckpointError, match="base_layer"):
        torch_keys.from_torch(tensors, clip_map(TINY))
    with pytest.raises(ConfigError, match=r"decoder\.lora"):
        clip_recipes.clip_from_lora(tensors, ADAPTED)


# Models from parts


@pytest.fixture
def parts():
    """A stage-2 model of 2 frames, InternVL-C and a delta, for `TINY` of 4 frames."""
    vision = dataclasses.replace(TINY.vision, num_frames=2)
    entries = encoder_map(vision, key_prefix="vision_encoder.")
    stage2 = torch_keys.to_torch(random_tree(entries, 1), entries)
    stage2 |= {
        "vision_encoder.img_pos_embed": np.zeros((1, 17, 32)),
        "vision_encoder.clip_pos_embed": np.zeros((1, 33, 32)),
        "vision_encoder.clip_decoder.0.head.weight": np.zeros((8, 32)),
        "vision_encoder.final_clip_decoder.norm.bias": np.zeros(8),
        "text_encoder.bert.embeddings.LayerNorm.bias": np.zeros(8),
        "temp": np.float32(0.07),
    }
    entries = llama_clip_map(TINY.text)
    text = torch_keys.to_torch(random_tree(entries, 2), entries)
    text |= {"visual.cls_token": np.zeros((1, 1, 8)), "logit_scale": np.zeros(())}
    delta = torch_keys.to_torch(random_tree(clip_delta_map(TINY), 3), clip_delta_map(TINY))
    return stage2, text, delta


def test_large_model_from_parts(parts):
    stage2, text, delta = parts
    out = clip_recipes.clip_from_parts(stage2, text, delta, TINY, vision_frames=2)
    params = torch_keys.from_torch(out, clip_map(TINY))
    assert params["temp"] == delta["temp"]
    pool = "vision_encoder.clip_projector.cross_attn.proj.weight"
    np.testing.assert_array_equal(out[pool], delta[pool])
    block = "vision_encoder.blocks.1.attn.qkv.weight"
    np.testing.assert_array_equal(out[block], stage2[block])
    np.testing.assert_array_equal(out["text_encoder.text_projection"], text["text_projection"])
    np.testing.assert_array_equal(
        np.asarray(out["vision_encoder.pos_embed"]),
        positions.resize_positions(stage2["vision_encoder.pos_embed"], (2, 4, 4), (4, 4, 4)),
    )


def test_without_a_delta_the_training_starts_from_stage_2(parts):
    stage2, text, _ = parts
    out = clip_recipes.clip_from_parts(stage2, text, None, TINY, vision_frames=2)
    assert out["temp"] == np.float32(TINY.temp_init)
    pool = "vision_encoder.clip_projector.cross_attn.proj.weight"
    np.testing.assert_array_equal(out[pool], stage2[pool])


def test_towers_alone_are_parts_too(parts):
    stage2, text, delta = parts
    whole = clip_recipes.clip_from_parts(stage2, text, delta, TINY, vision_frames=2)
    prefix = "vision_encoder."
    vision = {k.removeprefix(prefix): v for k, v in stage2.items() if k.startswith(prefix)}
    renamed = {f"text_encoder.{key}": value for key, value in text.items()}
    renamed = {k: v for k, v in renamed.items() if "visual" not in k and "logit" not in k}
    out = clip_recipes.clip_from_parts(vision, renamed, delta, TINY, vision_frames=2)
    assert out.keys() == whole.keys()
    for key, value in whole.items():
        np.testing.assert_array_equal(np.asarray(out[key]), np.asarray(value))


def test_values_of_parts_are_not_read(parts):
    class Unread:
        """Has a shape and a dtype, and fails when its values are asked for."""

        def __init__(self, array):
            self.shape, self.dtype = np.shape(array), np.asarray(array).dtype

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("read")

    lazy = [{key: Unread(value) for key, value in part.items()} for part in parts]
    out = clip_recipes.clip_from_parts(*lazy, TINY, vision_frames=2)
    assert {key: np.shape(value) for key, value in out.items()} == torch_keys.torch_shapes(
        clip_map(TINY)
    )


@pytest.mark.parametrize(
    ("part", "key", "message"),
    [
        (0, "vision_encoder.blocks.0.ls1.gamma", r"the stage-2 model does not fit.*\n.*1 missing"),
        (0, "vision_encoder.pos_embed", r"the stage-2 model does not fit"),
        (1, "text_projection", r"the text tower's file does not fit"),
        (2, "temp", r"the CLIP delta does not fit"),
    ],
)
def test_a_part_that_misses_a_tensor_is_named(parts, part, key, message):
    del parts[part][key]
    with pytest.raises(CheckpointError, match=message) as error:
        clip_recipes.clip_from_parts(*parts, TINY, vision_frames=2)
    assert key in str(error.value)


def test_positions_that_cannot_have_so_many_frames_are_refused(parts):
    with pytest.raises(CheckpointError, match=r"32 rows .* vision_frames=3"):
        clip_recipes.clip_from_parts(*parts, TINY, vision_frames=3)


def test_separable_positions_are_refused(parts):
    vision = dataclasses.replace(TINY.vision, separable_positions=True)
    with pytest.raises(ConfigError, match="separable_positions"):
        clip_recipes.clip_from_parts(*parts, dataclasses.replace(TINY, vision=vision))


@pytest.mark.parametrize("size", ["1B", "6B"])
def test_released_parts_make_the_released_model(size):
    """All shapes of the release: stage 2 of 4 frames, InternVL-C's tower and the delta."""
    config = WHOLE[f"multi_clip_{size}"]
    whole = _manifest(f"multi_clip_{size}")
    stage2 = {key: shape for key, shape in whole.items() if key.startswith("vision_encoder.")}
    stage2["vision_encoder.pos_embed"] = (1, 1 + 4 * 256, config.vision.width)
    text = {
        key.removeprefix("text_encoder."): shape
        for key, shape in whole.items()
        if key.startswith("text_encoder.")
    }
    delta = _manifest(f"multi_clip_{size}_released_delta_inferred")
    out = clip_recipes.clip_from_parts(_abstract(stage2), _abstract(text), _abstract(delta), config)
    assert {key: value.shape for key, value in out.items()} == whole


@pytest.fixture
def small_parts():
    """A distilled student, MobileCLIP and a delta, for `SMALL`."""
    entries = encoder_map(SMALL.vision)
    student = torch_keys.to_torch(random_tree(entries, 1), entries)
    student |= {"clip_pos_embed": np.zeros(3), "final_clip_decoder.head.0.bias": np.zeros(3)}
    entries = mobileclip_map(SMALL.text, key_prefix="text_encoder.")
    text = torch_keys.to_torch(random_tree(entries, 2), entries)
    text |= {"image_encoder.stem.weight": np.zeros(3), "logit_scale": np.zeros(())}
    delta = torch_keys.to_torch(random_tree(clip_delta_map(SMALL), 3), clip_delta_map(SMALL))
    return student, text, delta


def test_small_model_from_parts(small_parts):
    student, text, delta = small_parts
    out = clip_recipes.small_clip_from_parts(*small_parts, SMALL)
    torch_keys.from_torch(out, clip_map(SMALL))
    block = "blocks.2.mlp.fc1.weight"
    np.testing.assert_array_equal(out[f"vision_encoder.{block}"], student[block])
    np.testing.assert_array_equal(out["vision_align.1.weight"], delta["vision_align.1.weight"])
    key = "text_encoder.projection_layer"
    np.testing.assert_array_equal(out[key], text[key])


def test_small_model_that_starts_its_training(small_parts):
    student, text, _ = small_parts
    out = clip_recipes.small_clip_from_parts(student, text, None, SMALL)
    params = torch_keys.from_torch(out, clip_map(SMALL))
    np.testing.assert_array_equal(params["vision_align"]["norm"]["scale"], 1)
    assert np.std(params["vision_align"]["proj"]["kernel"]) > 0
    other = clip_recipes.small_clip_from_parts(student, text, None, SMALL, seed=1)
    assert np.abs(out["vision_align.1.weight"] - other["vision_align.1.weight"]).max() > 0
