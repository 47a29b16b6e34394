"""The restricted reader of old PyTorch files, on files made by hand and by torch."""

from __future__ import annotations

import importlib.util
import os
import pickle

import numpy as np
import pytest

from iv2_jax.errors import CheckpointError
from iv2_jax.interop.legacy_pickle import load_legacy_pickle

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {}}


def text(value: str) -> bytes:
    """Pickle opcodes that push a text."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    """Pickle opcodes that push a small whole number."""
    return b"J" + value.to_bytes(4, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    key: str,
    size: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    offset: int = 0,
    storage: bytes = b"ctorch\nFloatStorage\n",
) -> bytes:
    """Opcodes of a tensor as torch writes them."""
    pid = b"(" + text("storage") + storage + text(key) + text("cpu") + number(size) + b"NtQ"
    arguments = b"(" + pid + number(offset) + numbers(*shape) + numbers(*strides)
    hooks = b"\x89ccollections\nOrderedDict\n)Rt"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + hooks + b"R"


def state(**values: bytes) -> bytes:
    """Opcodes of a dict of what `values` push."""
    items = b"".join(text(key) + value for key, value in values.items())
    return b"\x80\x02}(" + items + b"u."


def legacy_file(path, contents: bytes, storages: dict[str, np.ndarray]):
    """Writes a file of the old format."""
    head = [pickle.dumps(x, 2) for x in (MAGIC, PROTOCOL, SYSTEM)]
    tail = [pickle.dumps(list(storages), 2)]
    for array in storages.values():
        tail += [array.size.to_bytes(8, "little"), array.tobytes()]
    path.write_bytes(b"".join([*head, contents, *tail]))
    return path


ONE_TO_SIX = np.arange(1, 7, dtype=np.float32)


@pytest.fixture
def good_file(tmp_path):
    contents = state(w=tensor("0", 6, (2, 3), (3, 1)), v=tensor("0", 6, (2, 2), (1, 2), offset=1))
    return legacy_file(tmp_path / "good.pth", contents, {"0": ONE_TO_SIX})


def test_reads_views_of_one_storage(good_file):
    arrays = load_legacy_pickle(good_file)
    np.testing.assert_array_equal(arrays["w"], [[1, 2, 3], [4, 5, 6]])
    np.testing.assert_array_equal(arrays["v"], [[2, 4], [3, 5]])
    assert arrays["w"].dtype == np.float32
    arrays["w"][:] = 0  # owns its memory
    assert arrays["v"][0, 0] == 2


def test_every_cut_is_reported_with_the_file_name(good_file):
    whole = good_file.read_bytes()
    for length in range(0, len(whole), 7):
        good_file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"good\.pth"):
            load_legacy_pickle(good_file)


def test_foreign_global_is_named_and_not_run(tmp_path):
    target = tmp_path / "made_by_the_pickle"
    attack = b"cos\nmkdir\n(" + text(str(target)) + b"tR"
    path = legacy_file(tmp_path / "evil.pth", state(w=attack), {})
    with pytest.raises(CheckpointError, match=r"evil\.pth names the global os\.mkdir"):
        load_legacy_pickle(path)
    assert not target.exists()


def test_a_pickle_cannot_change_the_stand_ins(good_file, tmp_path):
    for attribute, stand_in in (
        ("__defaults__", b"ctorch._utils\n_rebuild_tensor_v2\n"),
        ("dtype", b"ctorch\nFloatStorage\n"),
    ):
        # BUILD with (None, {attribute: 1}) sets attributes where it can.
        attack = stand_in + b"(N}" + text(attribute) + number(1) + b"stb"
        path = legacy_file(tmp_path / "build.pth", state(w=attack), {})
        with pytest.raises(CheckpointError, match=r"build\.pth"):
            load_legacy_pickle(path)
    assert load_legacy_pickle(good_file)["w"].dtype == np.float32


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"PK\x03\x04rest", "zip format"),
        (pickle.dumps({"a": 1}, 2), "magic number"),
        (b"weights", "magic number"),
        (b"", "magic number"),
        (pickle.dumps(MAGIC, 2) + pickle.dumps(7, 2), "protocol 7"),
        (
            pickle.dumps(MAGIC, 2)
            + pickle.dumps(PROTOCOL, 2)
            + pickle.dumps({"little_endian": False}, 2),
            "big-endian",
        ),
    ],
)
def test_other_formats_are_told_apart(tmp_path, start, message):
    path = tmp_path / "other.pth"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=rf"other\.pth.*{message}"):
        load_legacy_pickle(path)


@pytest.mark.parametrize(
    "broken",
    [
        tensor("0", 6, (3, 3), (3, 1)),  # beyond the storage
        tensor("0", 6, (2,), (-1,), offset=3),
        tensor("0", 6, (2,), (1,), offset=-1),
        tensor("0", 7, (2,), (1,)),  # the tail says 6
        tensor("1", 6, (2,), (1,)),  # not in the list of storages
    ],
)
def test_tensors_that_do_not_fit_their_storage(tmp_path, broken):
    path = legacy_file(tmp_path / "odd.pth", state(w=broken), {"0": ONE_TO_SIX})
    with pytest.raises(CheckpointError, match=r"odd\.pth is cut off or damaged"):
        load_legacy_pickle(path)


def test_values_that_are_no_tensors_are_named(tmp_path):
    path = legacy_file(tmp_path / "mixed.pth", state(epoch=number(3)), {})
    with pytest.raises(CheckpointError, match=r"mixed\.pth: 'epoch' is a int, not a tensor"):
        load_legacy_pickle(path)


def test_a_list_is_no_state_dict(tmp_path):
    path = legacy_file(tmp_path / "list.pth", b"\x80\x02].", {})
    with pytest.raises(CheckpointError, match="holds a list"):
        load_legacy_pickle(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth cannot be read: No such file"):
        load_legacy_pickle(tmp_path / "absent.pth")


@pytest.mark.torch
def test_agrees_with_torch_on_every_dtype(tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch.save")
    tensors = {
        str(dtype): torch.arange(-3, 9).reshape(3, 4).to(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        )
    }
    tensors |= {
        "transposed": tensors["torch.float32"].T,
        "slice": tensors["torch.float32"][1:, ::2],
        "scalar": torch.tensor(5.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "all.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    arrays = load_legacy_pickle(path)
    assert list(arrays) == list(tensors)
    for key, expected in tensors.items():
        assert arrays[key].shape == tuple(expected.shape), key
        assert str(arrays[key].dtype) == str(expected.dtype).removeprefix("torch."), key
        np.testing.assert_array_equal(
            arrays[key].astype(np.float64), expected.detach().double().numpy(), err_msg=key
        )


@pytest.mark.torch
def test_agrees_with_torch_on_the_installed_weights():
    torch = pytest.importorskip("torch", reason="compares with torch.load")
    from iv2_jax.models.teachers import efficientnet

    if importlib.util.find_spec(efficientnet.PACKAGE) is None:
        pytest.skip(f"needs the package {efficientnet.PACKAGE}")
    path = efficientnet.find_weights()
    ours, theirs = load_legacy_pickle(path), torch.load(path, weights_only=True)
    assert list(ours) == list(theirs)
    assert sum(a.size for k, a in ours.items() if k.endswith(("weight", "bias"))) == 4_652_008
    for key, expected in theirs.items():
        np.testing.assert_array_equal(ours[key], expected.numpy(), err_msg=key)


def test_needs_no_torch(good_file):
    """Reading must not import torch: the demo runs without it."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from iv2_jax.interop.legacy_pickle import load_legacy_pickle as load\n"
        f"print(load({os.fspath(good_file)!r})['w'].sum())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "21.0", run.stderr
