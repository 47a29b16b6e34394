"""Export, import and what they refuse."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import (
    export,
    export_command,
    families,
    import_command,
    load,
    preprocessing,
    run_config,
    torch_keys,
)
from iv2_jax.models.student import AlignmentConfig, StudentConfig
from iv2_jax.models.video_encoder import EncoderConfig
from iv2_jax.train import checkpoint

ENCODER = EncoderConfig(
    32, 2, 4, 48, image_size=28, num_frames=2, pool_heads=4, pool_width=24, layer_scale_init=0.1
)
STUDENT = StudentConfig(
    encoder=ENCODER,
    clip=AlignmentConfig(20, (-2, -1), "linear", False, grid=(2, 3, 3)),
    mae=AlignmentConfig(12, (1,), "mlp", False),
    final_width=10,
    final_decoder="mlp",
)
BARE = StudentConfig(ENCODER, clip=None, mae=None, final_width=0, final_decoder="linear")


def _params(config, seed=0):
    """Random parameters whose values are of the size of trained ones."""
    rng = np.random.default_rng(seed)
    abstract = torch_keys.abstract_params(families.of(config).entries(config))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4") * 0.1, abstract)


def _clips(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (2, ENCODER.num_frames, 28, 28, 3)).astype(np.uint8)


def _equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_folder_holds_what_its_card_says(tmp_path):
    folder = export.export_model(_params(STUDENT), STUDENT, tmp_path / "out", source="runs/s1")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessing.json",
        "torch_models",
    }
    tensors = load_file(folder / "model.safetensors")
    assert tensors["clip_decoder.1.head.weight"].shape == (20, 32)
    assert tensors["mae_decoder.0.head.2.weight"].shape == (12, 32)
    assert run_config.read_exported(folder) == STUDENT
    spec = json.loads((folder / "preprocessing.json").read_text())
    assert (spec["num_frames"], spec["image_size"]) == (2, 28)
    card = (folder / "README.md").read_text()
    assert "runs/s1" in card
    assert "on a grid of (2, 3, 3)" in card
    assert "{" not in re.sub(r"```.*?```", "", card, flags=re.S)


def test_preprocessing_rule_is_the_loaders():
    from iv2_jax.data import sampling

    text = preprocessing.video(EncoderConfig(384, 12, 6, 1536))["sampling"]
    rule = re.search(r"frame i is (.*), i = ", text).group(1)
    for count in (3, 8, 100, 300):
        named = {"n": count, "T": 8, "round": lambda x: int(np.round(x)), "int": int}
        ours = [eval(rule, {"__builtins__": {}}, named | {"i": i}) for i in range(8)]
        assert list(np.minimum(ours, count - 1)) == list(sampling.segments_eval(count, 8))


@pytest.mark.torch
@pytest.mark.parametrize("weight_format", ["safetensors", "torch"])
@pytest.mark.parametrize("config", [STUDENT, BARE, ENCODER], ids=["student", "bare", "encoder"])
def test_exported_folder_agrees_with_flax(tmp_path, config, weight_format):
    pytest.importorskip("torch", reason="needs the torch extra")
    params = _params(config)
    folder = export.export_model(params, config, tmp_path, weight_format=weight_format)
    assert export.verify_export(folder, params, config, _clips()) < 1e-5


@pytest.mark.torch
def test_verification_notices_one_wrong_tensor(tmp_path):
    pytest.importorskip("torch", reason="needs the torch extra")
    params = _params(ENCODER)
    folder = export.export_model(params, ENCODER, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["blocks.0.attn.qkv.weight"]
    tensors["blocks.0.attn.qkv.weight"] = np.ascontiguousarray(weight[::-1])
    save_file(tensors, folder / "model.safetensors")
    assert export.verify_export(folder, params, ENCODER, _clips()) > 1e-3
    del tensors["cls_token"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="cls_token"):
        export.verify_export(folder, params, ENCODER, _clips())


@pytest.mark.torch
@pytest.mark.parametrize("weight_format", ["safetensors", "torch"])
def test_the_lines_of_the_card_run_without_us(tmp_path, weight_format):
    pytest.importorskip("torch", reason="needs the torch extra")
    params = _params(STUDENT)
    folder = export.export_model(params, STUDENT, tmp_path, weight_format=weight_format)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S).group(1)
    code += "\nimport sys\nassert not any(m.startswith(('iv2_jax', 'jax')) for m in sys.modules)"
    code += "\nprint(tuple(out.pooled.shape), tuple(out.tokens.shape))"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "(1, 24) (1, 9, 32)"


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        export.export_model(_params(ENCODER), ENCODER, tmp_path)
    export.export_model(_params(ENCODER), ENCODER, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_parameters_that_do_not_fit_write_nothing(tmp_path):
    params = _params(ENCODER)
    params["pool"]["q"]["kernel"] = params["pool"]["q"]["kernel"][:, :2]
    with pytest.raises(CheckpointError, match="pool/q/kernel"):
        export.export_model(params, ENCODER, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="mae_decoder"):
        export.export_model(_params(STUDENT), BARE, tmp_path / "out")
    with pytest.raises(ConfigError, match="onnx"):
        export.export_model(_params(ENCODER), ENCODER, tmp_path / "out", weight_format="onnx")


def test_folders_of_others_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        run_config.read_exported(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(CheckpointError, match="iv2 export"):
        run_config.read_exported(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        run_config.read_exported(tmp_path)
    with pytest.raises(CheckpointError, match="student"):
        run_config.read_run({"stage": "align"})


def _run(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_checkpoint_to_folder_and_back(tmp_path, capsys):
    params = _params(STUDENT)
    load.save_checkpoint(params, STUDENT, tmp_path / "run", source="test")
    ckpt, folder, again = (tmp_path / name for name in ("run", "exported", "again"))
    assert _run(export_command, "--ckpt", ckpt, "--to", folder) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert _run(import_command, "--from", folder, "--out", again) == 0
    back, values = checkpoint.load_params(again)
    _equal(back, params)
    assert run_config.read_run(values) == STUDENT
    with pytest.raises(CheckpointError, match="not empty"):
        _run(import_command, "--from", folder, "--out", again)
    encoder = tmp_path / "encoder"
    assert _run(export_command, "--ckpt", ckpt, "--to", encoder, "--encoder-only") == 0
    assert run_config.read_exported(encoder) == ENCODER


def test_a_bare_encoder_is_taken_out_of_a_student(tmp_path, monkeypatch, caplog):
    from iv2_jax.models import zoo

    monkeypatch.setattr(zoo, "get", lambda name: ENCODER)
    params = _params(STUDENT)
    tensors = torch_keys.to_torch(params, torch_keys.student_map(STUDENT))
    save_file(tensors, tmp_path / "s.safetensors")
    file, out = tmp_path / "s.safetensors", tmp_path / "out"
    with caplog.at_level("INFO"):
        assert _run(import_command, "--from", file, "--model", "tiny", "--out", out) == 0
    assert "alignment decoders" in caplog.text
    back, values = checkpoint.load_params(out)
    _equal(back, {"encoder": params["encoder"]})
    assert run_config.read_run(values) == BARE
    with pytest.raises(ConfigError, match="--model"):
        _run(import_command, "--from", file, "--out", tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5_000_000_000), ("200mb", 200_000_000), ("1.5KB", 1500), ("77", 77)]
)
def test_shard_sizes(text, size):
    assert export_command._bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5TB", "-1", "0", "five"])
def test_shard_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="--max-shard-size"):
        export_command._bytes(text)


def test_hf_folder_by_the_command(tmp_path):
    """Without transformers: what is in the folder; `test_hf.py` loads such folders."""
    load.save_checkpoint(_params(STUDENT), STUDENT, tmp_path / "run", source="test")
    out = tmp_path / "hf"
    arguments = ("--ckpt", tmp_path / "run", "--to", out, "--format", "hf")
    assert _run(export_command, *arguments, "--max-shard-size", "20KB") == 0
    contents = json.loads((out / "config.json").read_text())
    assert contents["auto_map"]["AutoModel"] == "modeling_iv2.Iv2Model"
    assert contents["torch_dtype"] == "float32"
    assert contents["weights"] == "model.safetensors.index.json"
    sizes = sorted(path.stat().st_size for path in out.glob("*.safetensors"))
    assert len(sizes) > 4
    assert sizes[-2] < 25_000  # one tensor is larger than a shard may be, and stands alone
    assert "from .video import from_config" in (out / "modeling_iv2.py").read_text()
    assert {"video.py", "preprocessor_config.json", "README.md"} <= {p.name for p in out.iterdir()}


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        folder = export.export_model(_params(ENCODER), ENCODER, tmp_path / "out")
        options = ("--from", folder, "--out", tmp_path / "ckpt")
        assert _run(import_command, *options) == 0
    finally:
        os.umask(before)
    for path in (folder, tmp_path / "ckpt"):
        for part in path.rglob("*"):
            assert part.stat().st_mode & 0o044 == 0o044, part


def test_modules_that_a_file_imports_are_copied_too():
    assert set(export.torch_sources("chat.py")) >= {"chat.py", "bridge.py", "text.py", "video.py"}
    for name in ("stage2.py", "clip.py", "shots.py", "llm.py"):
        for text in export.torch_sources(name).values():
            compile(text, name, "exec")
            assert "iv2_jax" not in text.replace('"iv2_jax"', "")


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    from iv2_jax.interop import model_card

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_card, "render", fail)
    with pytest.raises(OSError, match="No space"):
        export.export_model(_params(ENCODER), ENCODER, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_kinds_go_through_checkpoints(tmp_path):
    from iv2_jax.models import zoo
    from tests.interop.family_cases import random_params

    config = zoo.get("test_tiny_beats")
    load.save_checkpoint(random_params(config), config, tmp_path / "run", source="test")
    folder = tmp_path / "out"
    assert _run(export_command, "--ckpt", tmp_path / "run", "--to", folder) == 0
    assert run_config.read_exported(folder) == config
    assert "BEATs" in (folder / "README.md").read_text()
    with pytest.raises(ConfigError, match="--encoder-only"):
        _run(export_command, "--ckpt", tmp_path / "run", "--to", tmp_path / "x", "--encoder-only")


@pytest.mark.torch
@pytest.mark.parametrize("name", ["test_tiny_stage2_audiovisual", "test_tiny_chat"])
def test_composed_models_load_from_their_folder(tmp_path, name):
    pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.models import zoo
    from tests.interop.family_cases import random_params

    config = zoo.get(name)
    params = random_params(config)
    folder = export.export_model(params, config, tmp_path / "out", weight_format="torch")
    model, _ = export.load_exported(folder)
    state = torch_keys.to_torch(params, families.of(config).entries(config))
    assert set(model.state_dict()) == set(state)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[key])
