"""Weight files: what is read, and what is refused with which words."""

from __future__ import annotations

import argparse

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from iv2_jax.errors import CheckpointError
from iv2_jax.interop import load, torch_keys
from iv2_jax.models.video_encoder import EncoderConfig

TINY = EncoderConfig(16, 2, 2, 24, image_size=28, num_frames=1, pool_heads=2, pool_width=8)


def _tensors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = torch_keys.torch_shapes(torch_keys.encoder_map(TINY))
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def _equal(opened, tensors):
    assert opened.keys() == tensors.keys()
    for key, value in tensors.items():
        assert opened[key].shape == value.shape
        assert opened[key].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(opened[key]), value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_safetensors(tmp_path, dtype):
    tensors = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.ones((), dtype)}
    save_file(tensors, tmp_path / "x.safetensors")
    _equal(load.open_tensors(tmp_path / "x.safetensors"), tensors)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs the torch extra")


def _state(torch, tensors):
    return {key: torch.from_numpy(value.copy()) for key, value in tensors.items()}


@pytest.mark.torch
@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_flat_pickles(tmp_path, torch, ending, zipped):
    tensors = _tensors()
    path = tmp_path / f"x{ending}"
    torch.save(_state(torch, tensors), path, _use_new_zipfile_serialization=zipped)
    opened = load.open_tensors(path)
    _equal(opened, tensors)
    assert opened.wrapper is None


@pytest.mark.torch
@pytest.mark.parametrize("wrapper", ["module", "model"])
def test_wrapped_pickles(tmp_path, torch, wrapper, caplog):
    tensors = _tensors()
    # A training script's checkpoint: arguments and counters beside the weights.
    contents = {
        wrapper: _state(torch, tensors),
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3),
        "optimizer": {"state": {0: {"step": 5}}},
    }
    torch.save(contents, tmp_path / "x.pth")
    with caplog.at_level("INFO"):
        opened = load.open_tensors(tmp_path / "x.pth")
    assert opened.wrapper == wrapper
    assert f"weights taken from key '{wrapper}'" in caplog.text
    _equal(opened, tensors)


@pytest.mark.torch
def test_module_comes_before_model_and_a_wrapper_can_be_asked_for(tmp_path, torch):
    one, two = {"a": np.ones(2, np.float32)}, {"a": np.zeros(2, np.float32)}
    contents = {"model": _state(torch, two), "module": _state(torch, one), "ema": {"x": 1}}
    torch.save(contents, tmp_path / "x.pt")
    assert np.asarray(load.open_tensors(tmp_path / "x.pt")["a"])[0] == 1
    assert np.asarray(load.open_tensors(tmp_path / "x.pt", wrapper="model")["a"])[0] == 0
    with pytest.raises(CheckpointError, match=r"under 'ema'.*'model', 'module', 'ema'"):
        load.open_tensors(tmp_path / "x.pt", wrapper="ema")


@pytest.mark.torch
def test_bfloat16_pickles(tmp_path, torch):
    value = np.arange(5).astype(ml_dtypes.bfloat16)
    torch.save({"a": torch.arange(5).bfloat16()}, tmp_path / "x.pt")
    _equal(load.open_tensors(tmp_path / "x.pt"), {"a": value})


class _Bomb:
    """Runs a function when it is unpickled."""

    def __reduce__(self):
        return print, ("boom",)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(tmp_path, torch, capsys, zipped):
    contents = {"a": torch.zeros(1), "bomb": _Bomb()}
    torch.save(contents, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be read"):
        load.open_tensors(tmp_path / "x.pth")
    assert "boom" not in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.parametrize("contents", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_pickles_that_are_none(tmp_path, torch, contents):
    (tmp_path / "x.pth").write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be read"):
        load.open_tensors(tmp_path / "x.pth")


@pytest.mark.torch
def test_pickles_without_weights(tmp_path, torch):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt holds a list"):
        load.open_tensors(tmp_path / "list.pt")
    torch.save({"state": {"a": torch.zeros(1)}, "epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="'module' or 'model'; at the top: 'state', 'epoch'"):
        load.open_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("contents", [b"", b"not a checkpoint, surely not one", b"\xff" * 64])
def test_safetensors_that_are_none(tmp_path, contents):
    (tmp_path / "x.safetensors").write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a readable safetensors"):
        load.open_tensors(tmp_path / "x.safetensors")


def test_a_cut_off_safetensors_file(tmp_path):
    save_file(_tensors(), tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a readable safetensors"):
        load.open_tensors(tmp_path / "x.safetensors")


def test_missing_files_and_unknown_endings(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weight file .*gone\.pth"):
        load.open_tensors(tmp_path / "gone.pth")
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ending '\.ckpt'"):
        load.open_tensors(tmp_path / "x.ckpt")


def test_prefix(tmp_path, caplog):
    tensors = _tensors()
    named = {f"vision_encoder.{key}": value for key, value in tensors.items()}
    save_file(named | {"text.x": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    entries = torch_keys.encoder_map(TINY)
    with caplog.at_level("INFO"):
        params = load.load_params(tmp_path / "x.safetensors", entries, prefix="vision_encoder.")
    assert "left out 1 keys" in caplog.text
    np.testing.assert_array_equal(params["cls_token"], tensors["cls_token"])
    with pytest.raises(CheckpointError, match=r"no key starts with 'video\."):
        load.load_params(tmp_path / "x.safetensors", entries, prefix="video.")


def test_the_error_names_the_file(tmp_path):
    tensors = _tensors()
    tensors["blocks.1.norm1.weights"] = tensors.pop("blocks.1.norm1.weight")
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"odd\.safetensors does not fit") as error:
        load.load_params(tmp_path / "odd.safetensors", torch_keys.encoder_map(TINY))
    assert "blocks.1.norm1.weight (nearest: blocks.1.norm1.weights)" in str(error.value)


def test_values_come_as_the_wanted_dtype(tmp_path):
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in _tensors().items()}
    save_file(tensors, tmp_path / "x.safetensors")
    entries = torch_keys.encoder_map(TINY)
    params = load.load_params(tmp_path / "x.safetensors", entries)
    assert params["cls_token"].dtype == np.float32
    params = load.load_params(tmp_path / "x.safetensors", entries, dtype=None)
    assert params["cls_token"].dtype == ml_dtypes.bfloat16
