"""Key tables of classifiers and stage-2 vision encoders, and our PyTorch classifiers."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from iv2_jax import config as config_lib
from iv2_jax.errors import CheckpointError
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.classifier import classifier_map
from iv2_jax.models import zoo
from iv2_jax.models.classifier import HEADS, MERGE_NORMS, Classifier, ClassifierConfig
from iv2_jax.models.student import AlignmentConfig, StudentConfig

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests"
SIZES = {"S": "small", "B": "base", "L": "large", "1B": "1b", "6B": "6b"}
ENCODER = dataclasses.replace(zoo.get("test_tiny"), depth=2, image_size=28, num_frames=2)
TINY = ClassifierConfig(ENCODER, num_classes=5)
VARIANTS = [("plain", "LN"), ("ap", "LN"), *itertools.product(HEADS[2:], MERGE_NORMS)]


def _read(path):
    return json.loads(gzip.decompress(path.read_bytes()))


def _config(name):
    """The classifier that a manifest of the original lists."""
    kind, size, task, frames, *variant = name.removeprefix("single_").split("_")
    frames = re.fullmatch(r"f(\d+)", frames)[1]
    if kind == "finetune":
        config = zoo.get(f"internvideo2_{SIZES[size]}_{task}_f{frames}")
        if variant == ["sep", "pos"]:
            encoder = dataclasses.replace(config.encoder, separable_positions=True)
            config = dataclasses.replace(config, encoder=encoder)
        return config
    config = zoo.get(f"internvideo2_{SIZES[size]}_{kind}_{task}_f{frames}")
    if kind == "cat":
        merge, norm = variant
        head = merge.replace("cls", "cls_").replace("proj", "_proj")
        norm = norm.replace("kaiming", "kaiming_")
        config = dataclasses.replace(config, head=head, merge_norm=norm)
    return config


PATHS = sorted((MANIFESTS / "classifier").glob("*.json.gz"))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_keys_shapes_and_dtypes_are_the_originals(path):
    manifest = _read(path)
    entries = classifier_map(_config(path.name.removesuffix(".json.gz")))
    tensors = torch_keys.to_torch(torch_keys.abstract_params(entries), entries)
    ours = {key: (list(t.shape), np.dtype(t.dtype).name) for key, t in tensors.items()}
    assert ours == {key: (shape, dtype) for key, (shape, dtype) in manifest.items()}


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_abstract_import_is_complete(path):
    manifest = _read(path)
    entries = classifier_map(_config(path.name.removesuffix(".json.gz")))
    tensors = {k: jax.ShapeDtypeStruct(tuple(s), np.dtype(d)) for k, (s, d) in manifest.items()}
    assert torch_keys.from_torch(tensors, entries) == torch_keys.abstract_params(entries)


def test_all_seventeen_manifests_are_there(shared_dir):
    names = {path.name.removesuffix(".gz") for path in PATHS}
    given = (shared_dir / "manifests").glob("single_[fac]*.json")
    assert names == {path.name for path in given}
    assert len(names) == 17


def _stage2(size, frames, image_positions):
    """Vision encoder of stage 2: a student without a video teacher (spec stage2 2)."""
    encoder = dataclasses.replace(
        zoo.get(f"internvideo2_{size}"), num_frames=frames, image_positions=image_positions
    )
    clip = AlignmentConfig(3200, tuple(range(-6, 0)), "linear", has_cls=True)
    return StudentConfig(encoder, clip, None, 768, "linear")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("multi_stage2_visual_1B", _stage2("1b", 4, "own")),
        ("multi_stage2_audiovisual_6B", _stage2("6b", 4, "shared")),
    ],
)
def test_stage2_vision_keys(name, config):
    manifest = _read(MANIFESTS / "stage2_vision" / f"vision_{name}.json.gz")
    entries = torch_keys.student_map(config, path_prefix="vision/", key_prefix="vision_encoder.")
    assert torch_keys.torch_shapes(entries) == {k: tuple(s) for k, (s, _) in manifest.items()}
    ours = zoo.abstract_params(config)
    assert _shapes({"vision": ours}) == _shapes(torch_keys.abstract_params(entries))


def _shapes(tree):
    return {k: v.shape for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def _random(entries, seed=0):
    rng = np.random.default_rng(seed)
    abstract = torch_keys.abstract_params(entries)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)
    if "down_norm" in params and "var" in params["down_norm"]:
        params["down_norm"]["var"] = np.abs(params["down_norm"]["var"]) + 0.5
        params["down_norm"]["count"] = np.float32(12345)
    return params


def _variant(head, norm):
    return dataclasses.replace(TINY, head=head, merge_norm=norm)


@pytest.mark.parametrize(("head", "norm"), VARIANTS)
def test_paths_and_shapes_are_our_models(head, norm):
    config = _variant(head, norm)
    abstract = torch_keys.abstract_params(classifier_map(config))
    assert _shapes(zoo.abstract_params(config)) == _shapes(abstract)


@pytest.mark.parametrize(("head", "norm"), VARIANTS)
def test_round_trip_is_exact(head, norm):
    entries = classifier_map(_variant(head, norm))
    tensors = torch_keys.to_torch(_random(entries), entries)
    if "down_norm.num_batches_tracked" in tensors:
        assert tensors["down_norm.num_batches_tracked"].dtype == np.int64
        assert tensors["down_norm.num_batches_tracked"] == 12345
    params = torch_keys.from_torch(tensors, entries)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    again = torch_keys.to_torch(params, entries)
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(again[key], value)


def test_another_heads_file_is_refused():
    entries = classifier_map(_variant("cls_avgN", "BN"))
    tensors = torch_keys.to_torch(_random(entries), entries)
    with pytest.raises(CheckpointError, match=r"down_norm\.running_mean"):
        torch_keys.from_torch(tensors, classifier_map(_variant("cls_avgN", "LN")))


@pytest.mark.torch
@pytest.mark.parametrize(("head", "norm"), VARIANTS)
def test_torch_module_gives_our_logits(head, norm):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import classifier as torch_models

    config: ClassifierConfig = _variant(head, norm)
    entries = classifier_map(config)
    params = jax.tree.map(lambda p: 0.3 * p if p.ndim > 1 else p, _random(entries, seed=1))
    model = torch_models.from_config({"kind": "classifier", "model": config_lib.to_dict(config)})
    tensors = torch_keys.to_torch(params, entries)
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()})
    e = config.encoder
    shape = (2, e.num_frames, e.image_size, e.image_size, 3)
    video = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    ours = jax.jit(Classifier(config).apply)({"params": params}, video)
    with torch.no_grad():
        theirs = model(torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())).numpy()
    assert np.abs(ours - theirs).max() < 1e-5 * max(1.0, np.abs(theirs).max())


@pytest.mark.torch
def test_torch_module_refuses_another_kind():
    pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import classifier as torch_models

    with pytest.raises(ValueError, match="'student'"):
        torch_models.from_config({"kind": "student"})
