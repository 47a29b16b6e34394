"""Writes a model as a folder that plain PyTorch loads, and checks it against the Flax model.

The folder holds the weights in the original's key names, `config.json`, `preprocessing.json`, a
model card and our PyTorch modules; with them it needs PyTorch and nothing of this project.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.resources
import importlib.util
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from iv2_jax import __version__
from iv2_jax import config as config_lib
from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import entries, families, model_card, run_config, weight_files
from iv2_jax.models.student import StudentConfig
from iv2_jax.models.video_encoder import EncoderConfig

CONFIG_FILE = run_config.CONFIG_FILE
PREPROCESSING_FILE = "preprocessing.json"
HF_PREPROCESSING_FILE = "preprocessor_config.json"
CARD_FILE = "README.md"
MODULE_FOLDER = "torch_models"
FORMATS = ("safetensors", "torch", "hf")
SHARD_BYTES = 5_000_000_000

_HF_MODULE = "modeling_iv2.py"
_HF_IMPORT = "from .video import from_config  # the file of the exported family; its others follow"


def export_model(
    params: Mapping[str, Any],
    config: Any,
    folder: str | Path,
    *,
    weight_format: Literal["safetensors", "torch", "hf"] = "safetensors",
    source: str = "",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a model for plain PyTorch, whole or not at all.

    Args:
        params: the model's parameters.
        config: its config, of any kind. A student without any alignment is written as an encoder.
        folder: where to; made if need be.
        weight_format: `safetensors`; `torch` for a `.pth` by `torch.save`; `hf` for a folder that
            `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads.
        source: where the weights come from, for the model card.
        overwrite: write into a folder that has files already.
        shard_bytes: largest shard of `hf`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the parameters do not fit the config, or the folder is not empty.
        ConfigError: `weight_format` is unknown, or the kind of model is never exported.
    """
    if weight_format not in FORMATS:
        raise ConfigError(f"format {weight_format!r} is none of {', '.join(FORMATS)}")
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(f"{folder} is not empty; name another folder, or use --overwrite")
    params, config = _plainest(params, config)
    family = families.of(config)
    if family.torch_file is None:
        raise ConfigError(f"models of kind {family.name} are read as teachers, never exported")
    table = family.entries(config)
    abstract = entries.to_torch(_abstract(params), table)  # checks names and shapes
    count = sum(math.prod(entry.shape) for entry in entries.parameters(table))
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / f".exporting-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        tensors = entries.torch_items(params, table)
        if weight_format == "torch":
            weights = weight_files.write_torch(work, tensors)
        else:
            sizes = weight_files.tensor_bytes(abstract)
            limit = shard_bytes if weight_format == "hf" else None
            weights = weight_files.write_safetensors(work, tensors, sizes, limit)
        contents = _contents(config, family, weights)
        spec = family.preprocessing_spec(config)
        if weight_format == "hf":
            dtypes = {np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(_abstract(params))}
            contents |= _hf_fields(dtypes)
            _write_hf_modules(work, family.torch_file)
            _write_json(work / HF_PREPROCESSING_FILE, spec)
        else:
            _write_package(work / MODULE_FOLDER, family.torch_file)
            _write_json(work / PREPROCESSING_FILE, spec)
        _write_json(work / CONFIG_FILE, contents)
        card = model_card.render(contents, spec, count, source)
        (work / CARD_FILE).write_text(card, encoding="utf-8")
        _move(work, folder)
    finally:
        shutil.rmtree(work)
        if made and not any(folder.iterdir()):
            folder.rmdir()
    return folder


def verify_export(
    folder: str | Path,
    params: Mapping[str, Any],
    config: StudentConfig | EncoderConfig,
    video: np.ndarray,
) -> float:
    """Runs an exported folder in PyTorch, by its own copy of the modules, against our encoder.

    Args:
        folder: written by `export_model`.
        params: the parameters that were exported.
        config: their config.
        video: (B, T, H, W, 3) uint8 clips of the model's size.

    Returns:
        Largest absolute difference over tokens and pooled features, float32 on both sides.

    Raises:
        CheckpointError: the folder is incomplete or its weights do not fit.
    """
    from iv2_jax.models.layers import Precision
    from iv2_jax.models.video_encoder import VideoEncoder

    theirs = _run_folder(Path(folder), np.asarray(video))
    encoder = config
    if isinstance(config, StudentConfig):
        params, encoder = params["encoder"], config.encoder
    encoder = dataclasses.replace(encoder, precision=Precision())
    with jax.default_matmul_precision("highest"):
        out = jax.jit(VideoEncoder(encoder).apply)({"params": params}, encoder.normalize(video))
    pairs = ((out.tokens, theirs[0]), (out.pooled, theirs[1]))
    return max(float(np.abs(np.asarray(ours) - torchs).max()) for ours, torchs in pairs)


def load_exported(folder: str | Path) -> tuple[Any, Any]:
    """Builds the PyTorch model of an exported folder by the folder's own modules.

    Args:
        folder: written by `export_model` as `safetensors` or `torch`.

    Returns:
        The module with its weights, and the folder's package of modules.

    Raises:
        CheckpointError: the folder is incomplete or its weights do not fit.
    """
    import torch

    folder = Path(folder)
    contents = run_config.read_json(folder / CONFIG_FILE)
    package = _import_package(folder / MODULE_FOLDER)
    model = package.from_config(contents)
    path = folder / contents["weights"]
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, weights_only=True)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {folder / CONFIG_FILE}: {error}") from error
    return model, package


def _run_folder(folder: Path, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and pooled features of an exported folder in PyTorch."""
    import torch

    model, package = load_exported(folder)
    spec = run_config.read_json(folder / PREPROCESSING_FILE)
    frames = package.preprocess(torch.from_numpy(video), spec)
    with torch.no_grad():
        out = model.float().encode(frames)
    return out.tokens.numpy(), out.pooled.numpy()


def _plainest(params: Mapping[str, Any], config: Any) -> tuple[Mapping[str, Any], Any]:
    """Takes the encoder out of a student that has nothing else."""
    if isinstance(config, StudentConfig) and not (config.clip or config.mae or config.final_width):
        if set(params) != {"encoder"}:
            raise CheckpointError(
                f"the config has an encoder only, but the parameters hold {sorted(params)}"
            )
        return params["encoder"], config.encoder
    return params, config


def _abstract(params: Mapping[str, Any]) -> Any:
    """Shapes and dtypes of parameters."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def _contents(config: Any, family: families.Family, weights: str) -> dict[str, Any]:
    """What config.json holds in every format."""
    return {
        "format": "iv2_jax",
        "version": __version__,
        "kind": family.name,
        "weights": weights,
        "model": config_lib.to_dict(config),
    }


def _hf_fields(dtypes: set[str]) -> dict[str, Any]:
    """What transformers wants to find in config.json."""
    return {
        "model_type": "iv2_jax",
        "architectures": ["Iv2Model"],
        "auto_map": {
            "AutoConfig": "modeling_iv2.Iv2Config",
            "AutoModel": "modeling_iv2.Iv2Model",
        },
        "torch_dtype": dtypes.pop() if len(dtypes) == 1 else "float32",
    }


def _write_package(folder: Path, torch_file: str) -> None:
    """Copies a family's modules, and those they import, as the package `torch_models`."""
    folder.mkdir()
    files = torch_sources(torch_file)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    lines = ['"""PyTorch modules of the exported model."""', ""]
    lines += [f"from .{torch_file.removesuffix('.py')} import from_config"]
    names = ["from_config"]
    if "video.py" in files:
        lines.append("from .video import preprocess")
        names.append("preprocess")
    lines += ["", f"__all__ = [{', '.join(map(repr, names))}]"]
    (folder / "__init__.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_hf_modules(folder: Path, torch_file: str) -> None:
    """Copies a family's modules flat, with the wrapper that transformers asks for.

    The library copies only files that the wrapper itself imports, so it imports all of them.
    """
    files = torch_sources(torch_file)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    wrapper = _source(_HF_MODULE)
    if _HF_IMPORT not in wrapper:
        raise AssertionError(f"{_HF_MODULE} has lost its line {_HF_IMPORT!r}")
    stem = torch_file.removesuffix(".py")
    lines = [f"from .{stem} import from_config"]
    for name in files:
        if name != torch_file:
            other = name.removesuffix(".py")
            lines.append(f"from .{other} import __name__ as _{other}  # noqa: F401 (to be copied)")
    text = wrapper.replace(_HF_IMPORT, "\n".join(lines))
    (folder / _HF_MODULE).write_text(text, encoding="utf-8")


def torch_sources(torch_file: str) -> dict[str, str]:
    """A file of `interop/torch_models` and all it imports of its neighbours, by name."""
    files: dict[str, str] = {}
    waiting = [torch_file]
    while waiting:
        name = waiting.pop()
        if name in files:
            continue
        files[name] = _source(name)
        for node in ast.walk(ast.parse(files[name])):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                found = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [f"{module}.py" for module in found]
    return files


def _source(name: str) -> str:
    """Text of a file of `interop/torch_models`."""
    folder = importlib.resources.files("iv2_jax.interop") / "torch_models"
    return (folder / name).read_text(encoding="utf-8")


def _move(work: Path, folder: Path) -> None:
    """Moves what was written into its place."""
    mode = (work / CONFIG_FILE).stat().st_mode
    for path in sorted(work.iterdir()):
        if path.is_file():
            path.chmod(mode)  # safetensors makes files that their owner alone can read
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _import_package(folder: Path) -> Any:
    """Imports the package of an exported folder under a name of its own."""
    path = folder / "__init__.py"
    if not path.is_file():
        raise CheckpointError(f"no {folder.name} in {folder.parent}: not an exported folder")
    name = "iv2_exported_models"
    for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        del sys.modules[loaded]
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # torch and typing look modules up by name
    spec.loader.exec_module(module)
    return module
