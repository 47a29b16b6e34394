"""Weights in many files, and files that claim more than they hold."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from iv2_jax.errors import CheckpointError
from iv2_jax.interop import load


def _tensors():
    rng = np.random.default_rng(0)
    return {f"blocks.{i}.weight": rng.normal(size=(3, 4)).astype("f4") for i in range(5)}


def _sharded(folder, *, index=True):
    """Two safetensors shards, with their index if asked for."""
    tensors = _tensors()
    keys = list(tensors)
    home = {}
    for number, part in enumerate((keys[:2], keys[2:]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name)
        home |= dict.fromkeys(part, name)
    if index:
        contents = {"metadata": {}, "weight_map": home}
        (folder / "model.safetensors.index.json").write_text(json.dumps(contents))
    return tensors, home


def _equal(opened, tensors):
    assert set(opened) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(np.asarray(opened[key]), value)


@pytest.mark.parametrize("index", [True, False], ids=["index", "bare shards"])
def test_folders_of_safetensors(tmp_path, index):
    tensors, _ = _sharded(tmp_path, index=index)
    _equal(load.open_tensors(tmp_path), tensors)


def test_an_index_by_its_name(tmp_path):
    tensors, _ = _sharded(tmp_path)
    _equal(load.open_tensors(tmp_path / "model.safetensors.index.json"), tensors)


def test_an_index_that_does_not_fit_its_shards(tmp_path):
    _, home = _sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"

    def refused(weight_map, match):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=match):
            load.open_tensors(tmp_path)

    refused(home | {"gone.weight": home["blocks.0.weight"]}, "lack 'gone.weight'")
    refused({k: v for k, v in home.items() if k != "blocks.0.weight"}, "beside it 'blocks.0.w")
    refused(home | {"x": "model-00003-of-00003.safetensors"}, r"1 of 3 shards miss.*00003")
    refused(home | {"x": "../secrets.safetensors"}, "not a file beside it")
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no sharded index"):
        load.open_tensors(tmp_path)


def test_shards_that_hold_a_key_twice(tmp_path):
    tensors, _ = _sharded(tmp_path, index=False)
    save_file(tensors, tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match=r"in both model-.* and whole\.safetensors"):
        load.open_tensors(tmp_path)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"has no weights.*it has 'notes\.txt'"):
        load.open_tensors(tmp_path)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs the torch extra")


def _state(torch):
    return {key: torch.from_numpy(value.copy()) for key, value in _tensors().items()}


@pytest.mark.torch
def test_pickled_index(tmp_path, torch):
    state = _state(torch)
    keys = list(state)
    home = {}
    for number, part in enumerate((keys[:3], keys[3:])):
        name = f"pytorch_model-{number}.bin"
        torch.save({key: state[key] for key in part}, tmp_path / name)
        home |= dict.fromkeys(part, name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": home}))
    _equal(load.open_tensors(tmp_path), _tensors())


@pytest.mark.torch
@pytest.mark.parametrize("where", ["file", "folder", "latest"])
def test_deepspeed(tmp_path, torch, where):
    folder = tmp_path / "checkpoint-9" if where == "latest" else tmp_path
    folder.mkdir(exist_ok=True)
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": _state(torch), "dp_world_size": 8, "optimizer": None}, path)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"not for us")
    if where == "latest":
        (tmp_path / "latest").write_text("checkpoint-9")
    opened = load.open_tensors(path if where == "file" else tmp_path)
    assert opened.wrapper == "module"
    _equal(opened, _tensors())


def test_deepspeed_folders_that_cannot_be_read(tmp_path):
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="zero_to_fp32"):
        load.open_tensors(tmp_path)
    for rank in range(2):
        (tmp_path / f"mp_rank_0{rank}_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="2 tensor-parallel parts"):
        load.open_tensors(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="no folder beside it"):
        load.open_tensors(tmp_path)


@pytest.mark.torch
def test_a_zip_bomb_is_not_unfolded(tmp_path, torch):
    torch.save(_state(torch), tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
        bomb.writestr("archive/data/9", bytes(50_000_000))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"is packed.*torch\.save never packs"):
        load.open_tensors(tmp_path / "bomb.pth")


@pytest.mark.torch
def test_overlapping_entries_of_an_archive(tmp_path, torch):
    """Many names for one stretch of the file: each is honest, their sum is not."""
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "x.pth")
    raw = bytearray((tmp_path / "x.pth").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        central, names = archive.start_dir, archive.namelist()
    at, records = central, []
    for _ in names:
        lengths = struct.unpack_from("<HHH", raw, at + 28)
        size = 46 + sum(lengths)
        records.append(bytes(raw[at : at + size]))
        at += size
    body = b"".join([*records, max(records, key=lambda r: struct.unpack_from("<I", r, 24)[0])])
    end = struct.pack(
        "<4sHHHHIIH", b"PK\5\6", 0, 0, len(names) + 1, len(names) + 1, len(body), central, 0
    )
    (tmp_path / "bomb.pth").write_bytes(bytes(raw[:central]) + body + end)
    with pytest.raises(CheckpointError, match="its entries claim"):
        load.open_tensors(tmp_path / "bomb.pth")


class _Storage:
    """Pickles as a storage of a trillion numbers."""


class _Liar(pickle.Pickler):
    def persistent_id(self, value):
        if isinstance(value, _Storage):
            return ("storage", _FloatStorage, "0", "cpu", 10**12, None)
        return None


class _FloatStorage:
    """Stands for `torch.FloatStorage` while the file is made."""


@pytest.mark.torch
def test_old_files_that_claim_more_than_they_hold(tmp_path, torch):
    body = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(value, body, protocol=2)
    start = body.tell()
    _Liar(body, protocol=2).dump({"a": _Storage()})
    raw = body.getvalue()
    named = f"c{__name__}\n_FloatStorage\n".encode()
    assert named in raw[start:]
    raw = raw[:start] + raw[start:].replace(named, b"ctorch\nFloatStorage\n")
    (tmp_path / "x.pth").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"claim 4,000,000,000,000 bytes, the file has"):
        load.open_tensors(tmp_path / "x.pth")


@pytest.mark.torch
def test_tensors_larger_than_what_is_stored(tmp_path, torch):
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="larger than what is stored"):
        load.open_tensors(tmp_path / "x.pth")


@pytest.mark.torch
def test_a_tensor_is_read_twice_the_same(tmp_path, torch):
    value = np.random.default_rng(0).normal(size=(600, 500)).astype("f4")
    shared = torch.from_numpy(value.copy())
    torch.save({"a": shared, "b": shared, "t": shared.T}, tmp_path / "x.pth")
    opened = load.open_tensors(tmp_path / "x.pth")
    for _ in range(2):
        for key in "ab":
            np.testing.assert_array_equal(np.asarray(opened[key]), value)
        np.testing.assert_array_equal(np.asarray(opened["t"]), value.T)
