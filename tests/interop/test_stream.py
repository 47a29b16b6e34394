"""The streamed import: what it writes, what it refuses, how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import entries, families, importing, stream
from iv2_jax.models import zoo
from iv2_jax.train import checkpoint
from tests.interop.family_cases import equal, random_params

NAME = "test_tiny_pretrain"
CONFIG = zoo.get(NAME)
TABLE = families.of(CONFIG).entries(CONFIG)


@pytest.fixture
def tensors():
    return entries.to_torch(random_params(CONFIG), TABLE)


def _import(tmp_path, tensors, **options):
    save_file(tensors, tmp_path / "x.safetensors")
    options = importing.ImportOptions(**options)
    return importing.import_model(tmp_path / "x.safetensors", NAME, tmp_path / "out", options)


def test_checkpoint_is_one_of_ours(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(stream, "_CHUNK", 1000)  # many chunks, the last of them not full
    _import(tmp_path, tensors)
    read, values = checkpoint.load_params(tmp_path / "out")
    equal(read, random_params(CONFIG))
    assert values["imported_from"].endswith("x.safetensors")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]
    # As a run restores it.
    with ocp.CheckpointManager((tmp_path / "out" / "checkpoints").absolute()) as manager:
        assert manager.latest_step() == 0
        got = manager.restore(0, args=ocp.args.Composite(params=ocp.args.StandardRestore(read)))
    equal(dict(got.params), read)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("file", ml_dtypes.bfloat16), ("bfloat16", ml_dtypes.bfloat16)]
)
def test_dtypes(tmp_path, tensors, dtype, expected):
    given = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    _import(tmp_path, given, dtype=dtype)
    read, _ = checkpoint.load_params(tmp_path / "out")
    assert read["encoder"]["cls_token"].dtype == expected
    np.testing.assert_array_equal(read["encoder"]["cls_token"], given["cls_token"])
    with pytest.raises(ConfigError, match="float8"):
        importing.ImportOptions(dtype="float8")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, tensors, value):
    tensors["blocks.1.attn.qkv.weight"][3, 4] = value
    tensors["pos_embed"][0, 0, 0] = value
    with pytest.raises(CheckpointError, match="2 tensors with NaNs") as error:
        _import(tmp_path, tensors)
    assert "blocks.1.attn.qkv.weight" in str(error.value)
    assert "pos_embed" in str(error.value)
    assert not (tmp_path / "out").exists()
    _import(tmp_path, tensors, allow_nonfinite=True)
    assert (tmp_path / "out" / "checkpoints" / "0").is_dir()


def test_missing_extra_and_misshaped_keys(tmp_path, tensors):
    del tensors["blocks.0.norm1.weight"]
    tensors["head.weight"] = np.zeros((3, 3), np.float32)
    tensors["pos_embed"] = tensors["pos_embed"][:, :-1].copy()
    with pytest.raises(CheckpointError) as error:
        _import(tmp_path, tensors)
    text = str(error.value)
    assert "1 missing:\n    blocks.0.norm1.weight" in text
    assert "1 unexpected:\n    head.weight" in text
    assert "pos_embed is (1, 64, 32), the model wants (1, 65, 32)" in text
    assert "most like test_tiny_pretrain" in text
    assert not (tmp_path / "out").exists()


def test_a_truncated_file(tmp_path, tensors):
    save_file(tensors, tmp_path / "y.safetensors")
    raw = (tmp_path / "y.safetensors").read_bytes()
    (tmp_path / "y.safetensors").write_bytes(raw[:-100])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        importing.import_model(tmp_path / "y.safetensors", NAME, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_half_way_leaves_nothing(tmp_path, tensors, monkeypatch):
    write, calls = stream._write_slice, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(stream, "_write_slice", fail)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot write to .*out: No space left"):
        _import(tmp_path, tensors)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_checkpoint_is_never_written_over(tmp_path, tensors):
    _import(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="is not empty"):
        _import(tmp_path, tensors)


# Peak memory over what the process took before, with every library already used once.
MEMORY = """
import dataclasses, json, resource, sys
import numpy as np
from iv2_jax.interop import entries, importing, load, stream
from iv2_jax.interop.torch_keys import encoder_map
from iv2_jax.models.video_encoder import EncoderConfig
from iv2_jax.models import zoo
path, out = sys.argv[1:]
small = EncoderConfig(width=32, depth=1, num_heads=2, mlp_width=8)
large = dataclasses.replace(small, width=1024, depth=3, num_heads=16, mlp_width=16384)
def ref(shape):
    return load.TensorRef(shape, np.dtype("f4"), lambda: np.zeros(shape, "f4"))
shapes = entries.torch_shapes(encoder_map(small))
stream.import_tensors({k: ref(s) for k, s in shapes.items()}, encoder_map(small), out + "0", {})
if not path.endswith(".safetensors"):
    import torch
    torch.save({"a": torch.zeros(9)}, out + ".pt")
    load.open_tensors(out + ".pt")["a"].read()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
opened = load.open_tensors(path)
stream.import_tensors(opened, encoder_map(large), out, {})
bytes_of = [int(np.prod(t.shape)) * t.dtype.itemsize for t in opened.values()]
slices = [int(np.prod(e.slice_shape)) * 4 for e in encoder_map(large)]
print(json.dumps([peak() - before, max(bytes_of), max(slices), sum(bytes_of)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", pytest.param("pt", marks=pytest.mark.torch)])
def test_memory_is_bounded(tmp_path, kind):
    from iv2_jax.models.video_encoder import EncoderConfig

    config = EncoderConfig(width=1024, depth=3, num_heads=16, mlp_width=16384)
    shapes = entries.torch_shapes(families.of(config).entries(config))
    made = {key: np.full(shape, 0.5, np.float32) for key, shape in shapes.items()}
    path = tmp_path / f"large.{kind}"
    if kind == "safetensors":
        save_file(made, path)
    else:
        torch = pytest.importorskip("torch", reason="needs the torch extra")
        torch.save({"module": {k: torch.from_numpy(v) for k, v in made.items()}}, path)
    del made
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    peak, largest, slice_bytes, total = json.loads(ran.stdout.splitlines()[-1])
    assert total > 400e6
    assert peak < 1.5 * largest + slice_bytes, (peak, largest, slice_bytes)
