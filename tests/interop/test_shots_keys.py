"""Shot-boundary networks to PyTorch and back: keys, round trips, our PyTorch form."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from iv2_jax import config as config_lib
from iv2_jax.errors import CheckpointError
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.shots import IGNORABLE, shots_map
from iv2_jax.models.shots import ZOO, ShotConfig, ShotLayer, ShotNet

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests" / "shots"

TINY = {
    "autoshot": ZOO["test_tiny_shots"],
    "transnetv2": dataclasses.replace(
        ZOO["test_tiny_shots"],
        key_style="transnetv2",
        layers=(ShotLayer(4, (3, 2)), ShotLayer(5, (2, 2, 1))),
    ),
}


@pytest.mark.parametrize("name", ["transnetv2", "autoshot"])
def test_keys_shapes_and_dtypes_are_the_originals(name):
    manifest = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    entries = shots_map(ZOO[name])
    tensors = torch_keys.to_torch(torch_keys.abstract_params(entries), entries)
    ours = {key: [list(tensor.shape), str(tensor.dtype)] for key, tensor in tensors.items()}
    assert ours == manifest
    given = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in manifest.items()}
    back = torch_keys.from_torch(given, entries, ignore=IGNORABLE)
    assert back == torch_keys.abstract_params(entries)


@pytest.mark.parametrize(("name", "values"), [("transnetv2", 7_618_056), ("autoshot", 14_301_000)])
def test_values_of_the_whole_state(name, values):
    """Running statistics and the six counters of batches included."""
    shapes = torch_keys.torch_shapes(shots_map(ZOO[name]))
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == values


@pytest.mark.parametrize("name", ["transnetv2", "autoshot", *(f"tiny_{k}" for k in TINY)])
def test_paths_and_shapes_are_our_models(name):
    config = TINY[name.removeprefix("tiny_")] if name.startswith("tiny") else ZOO[name]
    frames = jax.ShapeDtypeStruct((1, 3, config.frame_height, config.frame_width, 3), np.uint8)
    made = jax.eval_shape(ShotNet(config).init, jax.random.key(0), frames)["params"]
    flat = traverse_util.flatten_dict(made)
    assert all(isinstance(leaf, meta.AxisMetadata) for leaf in flat.values())
    ours = traverse_util.flatten_dict(torch_keys.abstract_params(shots_map(config)))
    made = traverse_util.flatten_dict(meta.unbox(made))
    assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in ours.items()}


def _params(config: ShotConfig, seed=0):
    """Parameters whose values all differ; variances are positive, counters whole."""
    rng = np.random.default_rng(seed)
    abstract = torch_keys.abstract_params(shots_map(config))

    def draw(path, leaf):
        name = path[-1].key
        values = rng.normal(size=leaf.shape) * 0.5
        values = {"var": 1 + np.abs(values), "count": np.float64(7)}.get(name, values)
        return np.asarray(values, np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


@pytest.mark.parametrize("name", sorted(TINY))
def test_round_trip_is_bit_exact(name):
    entries = shots_map(TINY[name])
    params = _params(TINY[name])
    tensors = torch_keys.to_torch(params, entries)
    back = torch_keys.from_torch(tensors, entries)
    jax.tree.map(np.testing.assert_array_equal, params, back)
    again = torch_keys.to_torch(back, entries)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor)
        assert again[key].dtype == tensor.dtype


def test_the_other_networks_file_is_refused():
    tensors = torch_keys.to_torch(_params(TINY["autoshot"]), shots_map(TINY["autoshot"]))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        torch_keys.from_torch(tensors, shots_map(TINY["transnetv2"]))


@pytest.mark.torch
@pytest.mark.parametrize("as_float", [False, True], ids=["uint8", "float"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_our_pytorch_form_gives_our_outputs(name, as_float):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import shots as torch_shots

    config = TINY[name]
    params = _params(config)
    contents = {"kind": "shots", "model": config_lib.to_dict(config)}
    theirs = torch_shots.from_config(json.loads(json.dumps(contents)))
    tensors = torch_keys.to_torch(params, shots_map(config))
    theirs.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()})
    frames = np.random.default_rng(1).integers(0, 256, (2, 7, 5, 6, 3)).astype(np.uint8)
    frames = frames.astype(np.float32) if as_float else frames
    ours = jax.jit(ShotNet(config).apply)({"params": params}, frames)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(frames))
    np.testing.assert_allclose(ours.single, expected.single.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.all, expected.all.numpy(), atol=1e-5)
    assert np.ptp(expected.single.numpy()) > 0.1


@pytest.mark.torch
def test_our_pytorch_form_refuses_another_kind():
    pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import shots as torch_shots

    with pytest.raises(ValueError, match="'shots'"):
        torch_shots.from_config({"kind": "student", "model": {}})
