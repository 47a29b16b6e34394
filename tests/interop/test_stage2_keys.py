"""Key tables of the stage-2 models and BEATs: the original's names, exact inverses, old forms."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from iv2_jax import config as config_lib
from iv2_jax.errors import CheckpointError
from iv2_jax.interop import families, torch_keys
from iv2_jax.interop.torch_keys.audio import beats_map, weight_norm_keys
from iv2_jax.interop.torch_keys.stage2 import IGNORABLE, stage2_map
from iv2_jax.models import kinds, stage2
from iv2_jax.models.audio import beats, beats_layers
from tests.interop.family_cases import check_round_trip, random_tree

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests" / "stage2"
MODELS = {
    "multi_beats_iter3": "beats_iter3",
    "multi_stage2_visual_1B": "internvideo2_stage2_1b",
    "multi_stage2_visual_1B_retmode": "internvideo2_stage2_1b_retrieval",
    "multi_stage2_audiovisual_6B": "internvideo2_stage2_6b",
    "multi_stage2_audiovisual_1B_hypothetical": "internvideo2_stage2_1b_audiovisual",
}
CONFIGS = beats.ZOO | stage2.ZOO
TINY = ["test_tiny_beats", "test_tiny_stage2", "test_tiny_stage2_audiovisual"]


def _entries(name):
    config = CONFIGS[name]
    return (beats_map if isinstance(config, beats.BeatsConfig) else stage2_map)(config)


def _manifest(name):
    return json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_shapes_are_the_originals(name):
    wanted = {key: tuple(shape) for key, (shape, _) in _manifest(name).items()}
    assert torch_keys.torch_shapes(_entries(MODELS[name])) == wanted


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_the_manifest_is_read_whole_and_written_again(name):
    """Abstract tensors: names, shapes and dtypes go through without allocating a model."""
    manifest, entries = _manifest(name), _entries(MODELS[name])
    file = {
        key: jax.ShapeDtypeStruct(tuple(shape), dtype) for key, (shape, dtype) in manifest.items()
    }
    params = torch_keys.from_torch(file, entries)
    assert params == torch_keys.abstract_params(entries)
    again = torch_keys.to_torch(params, entries)
    assert {k: (v.shape, str(v.dtype)) for k, v in again.items()} == {
        key: (tuple(shape), dtype) for key, (shape, dtype) in manifest.items()
    }


def test_shipped_manifests_are_the_originals(shared_dir):
    for name in MODELS:
        assert json.loads((shared_dir / f"manifests/{name}.json").read_text()) == _manifest(name)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("beats_iter3", 90_311_792),
        ("internvideo2_stage2_1b", 1_410_146_493),
        ("internvideo2_stage2_6b", 6_453_900_079),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    leaves = jax.tree.leaves(torch_keys.abstract_params(_entries(name)))
    assert sum(leaf.size for leaf in leaves) == count


@pytest.mark.parametrize("name", CONFIGS)
def test_paths_and_shapes_are_the_modules(name):
    config = CONFIGS[name]
    ours = torch_keys.abstract_params(_entries(name))
    module = kinds.of(config).abstract_params(config)
    flat = [traverse_util.flatten_dict(tree, sep="/") for tree in (ours, module)]
    assert {k: v.shape for k, v in flat[0].items()} == {k: v.shape for k, v in flat[1].items()}


@pytest.mark.parametrize("name", TINY)
def test_round_trip_is_exact(name):
    entries = _entries(name)
    params = random_tree(entries)
    check_round_trip(params, entries)


def test_layouts_put_each_value_where_the_original_has_it():
    entries = _entries("test_tiny_beats")
    params = random_tree(entries)
    tensors = torch_keys.to_torch(params, entries)
    conv = params["pos_conv"]
    assert tensors["encoder.pos_conv.0.weight_v"][7, 5, 2] == conv["weight_v"][2, 5, 7]
    assert tensors["encoder.pos_conv.0.weight_g"][0, 0, 3] == conv["weight_g"][3, 0, 0]
    patch = params["patch_embed"]["kernel"]
    assert tensors["patch_embedding.weight"][9, 0, 1, 2] == patch[1, 2, 9]
    attn = params["layers"]["attn"]
    assert tensors["encoder.layers.1.self_attn.grep_a"][0, 1, 0, 0] == attn["gate_scale"][1, 1]
    np.testing.assert_array_equal(
        tensors["encoder.layers.1.self_attn.q_proj.weight"][12 + 5],
        attn["q"]["kernel"][1, :, 1, 5],
    )


@pytest.fixture
def audio_file():
    """Entries, parameters and a state dict of an audio encoder."""
    entries = _entries("test_tiny_beats")
    params = random_tree(entries)
    return entries, params, torch_keys.to_torch(params, entries)


BIAS = "encoder.layers.{}.self_attn.relative_attention_bias.weight"


def test_the_shared_bias_table_is_written_for_every_layer(audio_file):
    _, params, tensors = audio_file
    for layer in range(CONFIGS["test_tiny_beats"].depth):
        np.testing.assert_array_equal(tensors[BIAS.format(layer)], params["relative_bias"])


@pytest.mark.parametrize("missing", [0, 1])
def test_one_copy_of_the_bias_table_is_enough(audio_file, missing):
    entries, params, tensors = audio_file
    del tensors[BIAS.format(missing)]
    jax.tree.map(np.testing.assert_array_equal, params, torch_keys.from_torch(tensors, entries))


def test_bias_tables_that_differ_are_refused(audio_file):
    entries, _, tensors = audio_file
    tensors[BIAS.format(1)] = tensors[BIAS.format(1)] + 1
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.relative_attention_bias"):
        torch_keys.from_torch(tensors, entries)


CONV = "encoder.pos_conv.0."


def test_names_of_newer_pytorch(audio_file):
    entries, params, tensors = audio_file
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        tensors[f"{CONV}parametrizations.weight.{new}"] = tensors.pop(CONV + old)
    got = torch_keys.from_torch(weight_norm_keys(tensors), entries)
    jax.tree.map(np.testing.assert_array_equal, params, got)


def test_a_plain_weight_is_taken_apart_without_changing_it(audio_file):
    entries, _, tensors = audio_file
    del tensors[f"{CONV}weight_g"]
    weight = tensors.pop(f"{CONV}weight_v")
    tensors[f"{CONV}weight"] = weight
    conv = torch_keys.from_torch(weight_norm_keys(tensors), entries)["pos_conv"]
    length = np.sqrt((conv["weight_v"] ** 2).sum(axis=(1, 2), keepdims=True))
    product = conv["weight_g"] * conv["weight_v"] / length
    np.testing.assert_allclose(product.transpose(2, 1, 0), weight, rtol=1e-6)


def test_two_forms_at_once_are_refused(audio_file):
    _, _, tensors = audio_file
    tensors[f"{CONV}weight"] = tensors[f"{CONV}weight_v"]
    with pytest.raises(CheckpointError, match="exclude each other"):
        weight_norm_keys(tensors)


def test_the_usual_form_is_passed_on_as_it_is(audio_file):
    _, _, tensors = audio_file
    assert weight_norm_keys(tensors) is tensors


@pytest.mark.parametrize("name", ["test_tiny_beats", "test_tiny_stage2_audiovisual"])
def test_the_importer_reads_names_of_newer_pytorch(name):
    config, entries = CONFIGS[name], _entries(name)
    params = random_tree(entries)
    tensors = torch_keys.to_torch(params, entries)
    prefix = "" if name == "test_tiny_beats" else "audio_encoder."
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        key = f"{prefix}{CONV}parametrizations.weight.{new}"
        tensors[key] = tensors.pop(f"{prefix}{CONV}{old}")
    tensors, entries = families.of(config).to_read(config, tensors)
    jax.tree.map(np.testing.assert_array_equal, params, torch_keys.from_torch(tensors, entries))


def test_teacher_and_classifier_are_left_out_by_name():
    entries = _entries("test_tiny_stage2_audiovisual")
    params = random_tree(entries)
    extra = torch_keys.to_torch(params, entries) | {
        "clip_teacher.blocks.0.ls1.gamma": np.zeros(3),
        "audio_encoder.predictor.weight": np.zeros((2, 3)),
    }
    got = torch_keys.from_torch(extra, entries, ignore=IGNORABLE)
    jax.tree.map(np.testing.assert_array_equal, params, got)
    with pytest.raises(CheckpointError, match="2 unexpected"):
        torch_keys.from_torch(extra, entries)


def test_a_visual_file_is_refused_by_the_audiovisual_model():
    entries = _entries("test_tiny_stage2")
    tensors = torch_keys.to_torch(random_tree(entries), entries)
    with pytest.raises(CheckpointError) as error:
        torch_keys.from_torch(tensors, _entries("test_tiny_stage2_audiovisual"))
    assert "av_concat_vision_proj" in str(error.value)


@pytest.mark.torch
@pytest.mark.parametrize("name", TINY)
def test_torch_modules_give_our_outputs(name):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import audio as torch_audio
    from iv2_jax.interop.torch_models import stage2 as torch_stage2

    config, entries = CONFIGS[name], _entries(name)
    kind = kinds.of(config)
    params = jax.tree.map(lambda x: 0.2 * x, random_tree(entries))
    module = torch_audio if kind.name == "beats" else torch_stage2
    model = module.from_config({"kind": kind.name, "model": config_lib.to_dict(config)})
    tensors = torch_keys.to_torch(params, entries)
    # Strict: nothing missing, nothing left over.
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()})

    inputs = _inputs(config)
    ours = jax.jit(kind.build(config).apply)({"params": params}, **inputs)
    if "video" in inputs:
        inputs["video"] = inputs["video"].transpose(0, 4, 1, 2, 3)
    with torch.no_grad():
        theirs = model(**{k: torch.from_numpy(v.copy()) for k, v in inputs.items()})
    pairs = {"tokens": (ours.tokens, theirs)} if kind.name == "beats" else _pairs(ours, theirs)
    for what, (ours, theirs) in pairs.items():
        ours, theirs = np.asarray(ours), theirs.numpy()
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max(), what


def _pairs(ours, theirs):
    """What both stage-2 models give, by name."""
    pairs = {"match": (ours.match_logits, theirs.match_logits)}
    if ours.audio is not None:
        pairs["audiovisual"] = ours.audiovisual, theirs.audiovisual
    for tower in ("vision", "text", "audio"):
        mine, its = getattr(ours, tower), getattr(theirs, tower)
        if mine is not None:
            tokens = mine.hidden if tower == "text" else mine.tokens
            pairs |= {f"{tower} joint": (mine.joint, its.joint), tower: (tokens, its.tokens)}
    return pairs


def _inputs(config):
    """Random arguments of both models' calls, ours with channels last."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    if isinstance(config, beats.BeatsConfig):
        return {"fbank": normal(2, config.num_frames, config.num_mels)}
    encoder = config.vision.encoder
    inputs = {
        "video": normal(2, encoder.num_frames, encoder.image_size, encoder.image_size, 3),
        "ids": rng.integers(0, config.text.vocab_size, (2, 6)),
        "mask": np.array([[1] * 6, [1] * 4 + [0] * 2]),
    }
    return inputs if config.audio is None else inputs | _inputs(config.audio)


@pytest.mark.torch
def test_torch_buckets_are_ours():
    """At every distance of the released sizes, though both take logarithms of their own."""
    pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import audio as torch_audio

    for buckets, farthest in ((320, 800), (320, 1280), (32, 40)):
        ours = beats_layers.relative_buckets(1300, buckets, farthest)
        theirs = torch_audio.relative_buckets(1300, buckets, farthest)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.torch
def test_another_kind_is_refused():
    pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import audio as torch_audio
    from iv2_jax.interop.torch_models import stage2 as torch_stage2

    for module, kind in ((torch_audio, "beats"), (torch_stage2, "stage2")):
        with pytest.raises(ValueError, match=f"'{kind}'"):
            module.from_config({"kind": "student", "model": {}})
