"""`--format hf`: folders that transformers' AutoModel loads offline, in plain PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from iv2_jax.interop import export, run_config
from iv2_jax.interop.load import open_tensors
from iv2_jax.models import kinds, zoo
from iv2_jax.models.masking import mask_to_visible
from tests.interop.family_cases import exported_names, random_params

pytestmark = [pytest.mark.torch, pytest.mark.slow]  # forty seconds of compiling eighteen models

# Runs in a process of its own, which must get by without this package and without a network. Reads
# inputs.npz of each folder and writes what the model gives, by name, to outputs.npz.
RUNNER = """
import sys
from pathlib import Path
import numpy as np, torch
from transformers import AutoModel
for folder in sys.argv[1:]:
    model, report = AutoModel.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), (folder, report)
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    inputs = np.load(Path(folder) / "inputs.npz")
    named = {key: torch.from_numpy(inputs[key]) for key in inputs.files}
    with torch.no_grad():
        out = model.eval()(**named)
    if not hasattr(out, "_asdict"):
        out = {"out": out}
    else:
        out = out._asdict()
    arrays = {key: value.numpy() for key, value in out.items() if isinstance(value, torch.Tensor)}
    np.savez(Path(folder) / "outputs.npz", **arrays)
assert not any(name.split(".")[0] in ("iv2_jax", "jax", "flax") for name in sys.modules)
"""


def _inputs(kind, config):
    """Random inputs by the argument's name in our model, from the kind's own shapes."""
    rng = np.random.default_rng(1)
    made = {}
    for name, value in kind.inputs(config).items():
        if not hasattr(value, "shape"):
            continue
        shape = (2, *value.shape[1:])
        if np.issubdtype(value.dtype, np.integer):
            made[name] = rng.integers(3, 30, shape).astype(np.int32)
        else:
            made[name] = rng.normal(size=shape).astype(np.float32)
    if kind.name == "student":
        mask = np.zeros(made["visible"].shape, bool)
        mask[:, 5:20] = True
        made["visible"] = mask
    if kind.name == "chat":
        made["visual_index"] = np.tile(np.array([-1, 0, 1, 2, -1, -1, -1, -1], np.int32), (2, 1))
    if kind.name == "shots":
        made["frames"] = rng.integers(0, 256, made["frames"].shape).astype(np.float32)
    return made


def _for_torch(kind, made):
    """The same as the PyTorch model takes them."""
    theirs = {}
    for name, value in made.items():
        if name == "video":
            value = np.moveaxis(value, -1, -4)
        if name == "visible":
            name = "mask"
        theirs[name] = value.astype(np.int64) if value.dtype == np.int32 else value
    return theirs


def _ours(kind, config, params, made):
    """What the Flax model gives, by name."""
    made = dict(made)
    if kind.name == "student":
        made["visible"] = mask_to_visible(made["visible"])
    with jax.default_matmul_precision("highest"):
        out = jax.jit(kind.build(config).apply)({"params": params}, **made)
    if isinstance(out, jax.Array):
        return {"out": np.asarray(out)}
    return {k: np.asarray(v) for k, v in vars(out).items() if v is not None}


# What stands under which name on the two sides, where that differs: theirs -> ours.
NAMES = {
    "encoder": {"out": "pooled"},
    "beats": {"out": "tokens"},
    "mobileclip": {"out": "pooled"},
    "llama_clip": {"out": "pooled"},
    "llm": {"out": "logits"},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Exports every tiny model, runs all of them in one other process, gives both sides."""
    pytest.importorskip("torch", reason="needs the torch extra")
    pytest.importorskip("transformers", reason="needs transformers (not a dependency)")
    root = tmp_path_factory.mktemp("hf")
    sides, folders = {}, []
    for name in exported_names():
        config = zoo.get(name)
        kind, params = kinds.of(config), random_params(config)
        folder = export.export_model(
            params, config, root / name, weight_format="hf", shard_bytes=40_000
        )
        made = _inputs(kind, config)
        np.savez(folder / "inputs.npz", **_for_torch(kind, made))
        sides[name] = kind, _ours(kind, config, params, made)
        folders.append(folder)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
    environment |= {
        "HF_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "USE_JAX": "0",
        "USE_FLAX": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *map(str, folders)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: (kind, ours, dict(np.load(root / name / "outputs.npz")), root / name)
        for name, (kind, ours) in sides.items()
    }


@pytest.mark.parametrize("name", exported_names())
def test_auto_model_gives_our_outputs(ran, name):
    kind, ours, theirs, _ = ran[name]
    compared = 0
    for key, value in theirs.items():
        key = NAMES.get(kind.name, {}).get(key, key)
        if key not in ours:
            continue
        compared += 1
        assert value.shape == ours[key].shape, key
        scale = max(1.0, float(np.abs(ours[key]).max()))
        assert float(np.abs(value - ours[key]).max()) < 1e-5 * scale, key
    assert compared, (sorted(theirs), sorted(ours))


def test_folder_is_sharded_and_comes_back(ran, tmp_path):
    _, _, _, folder = ran["test_tiny_pretrain"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    config = run_config.read_exported(folder)
    assert config == zoo.get("test_tiny_pretrain")
    tensors = open_tensors(run_config.exported_weights(folder))
    assert "blocks.0.attn.qkv.weight" in tensors
    assert index["metadata"]["total_size"] == sum(
        int(np.prod(t.shape)) * t.dtype.itemsize for t in tensors.values()
    )
    spec = json.loads((folder / "preprocessor_config.json").read_text())
    assert spec["num_frames"] == 4
    assert "AutoModel.from_pretrained" in (folder / "README.md").read_text()
