"""Writes a model as a folder that plain PyTorch loads, and checks it against the Flax model.

The folder holds the weights in the original's key names, `config.json`, `preprocessing.json`, a
model card and a copy of `torch_models.py`; with them it needs PyTorch and nothing of this project.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iv2_jax import __version__
from iv2_jax import config as config_lib
from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import model_card, torch_keys
from iv2_jax.interop.entries import Entry
from iv2_jax.models.student import StudentConfig
from iv2_jax.models.video_encoder import EncoderConfig

CONFIG_FILE = "config.json"
PREPROCESSING_FILE = "preprocessing.json"
CARD_FILE = "README.md"
MODULE_FILE = "torch_models.py"
_MODULE_SOURCE = "torch_models/video.py"
WEIGHT_FILES = {"safetensors": "model.safetensors", "torch": "model.pth"}

ModelConfig = StudentConfig | EncoderConfig


def export_model(
    params: Mapping[str, Any],
    config: ModelConfig,
    folder: str | Path,
    *,
    weight_format: Literal["safetensors", "torch"] = "safetensors",
    source: str = "",
    overwrite: bool = False,
) -> Path:
    """Writes a model for plain PyTorch.

    Args:
        params: the parameters of the student or of the encoder.
        config: its config. A student without any alignment is written as an encoder.
        folder: where to; made if need be.
        weight_format: `safetensors`, or `torch` for a `.pth` by `torch.save`.
        source: where the weights come from, for the model card.
        overwrite: write into a folder that has files already.

    Returns:
        The folder.

    Raises:
        CheckpointError: the parameters do not fit the config, or the folder is not empty.
        ConfigError: `weight_format` is unknown.
    """
    if weight_format not in WEIGHT_FILES:
        raise ConfigError(f"format {weight_format!r} is none of {sorted(WEIGHT_FILES)}")
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CheckpointError(f"{folder} is not empty; name another folder, or use --overwrite")
    params, config = _plainest(params, config)
    tensors = torch_keys.to_torch(params, model_entries(config))
    encoder = encoder_of(config)
    preprocessing = preprocessing_spec(encoder)
    contents = {
        "format": "iv2_jax",
        "version": __version__,
        "kind": "student" if isinstance(config, StudentConfig) else "encoder",
        "weights": WEIGHT_FILES[weight_format],
        "model": config_lib.to_dict(config),
    }
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder / WEIGHT_FILES[weight_format], tensors, weight_format)
    _write_json(folder / CONFIG_FILE, contents)
    _write_json(folder / PREPROCESSING_FILE, preprocessing)
    (folder / CARD_FILE).write_text(
        model_card.render(contents, preprocessing, count, source), encoding="utf-8"
    )
    module = importlib.resources.files("iv2_jax.interop") / _MODULE_SOURCE
    (folder / MODULE_FILE).write_text(module.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the model config of an exported folder.

    Raises:
        CheckpointError: the folder has no config.json that `export_model` wrote.
        ConfigError: a field of it is unknown or wrong.
    """
    contents = _read_json(Path(folder) / CONFIG_FILE)
    kinds = {"student": StudentConfig, "encoder": EncoderConfig}
    if contents.get("format") != "iv2_jax" or contents.get("kind") not in kinds:
        raise CheckpointError(f"{Path(folder) / CONFIG_FILE} was not written by `iv2 export`")
    return config_lib.build(kinds[contents["kind"]], contents["model"], path=CONFIG_FILE)


def weights_file(folder: str | Path) -> Path:
    """The weight file that the config.json of an exported folder names."""
    return Path(folder) / _read_json(Path(folder) / CONFIG_FILE)["weights"]


def run_model_config(run_config: Mapping[str, Any]) -> StudentConfig:
    """The student's config in the config saved with a checkpoint.

    Args:
        run_config: plain values, as `train.checkpoint.load_params` returns them.

    Raises:
        CheckpointError: the run trained no student.
        ConfigError: a field of it is unknown or wrong.
    """
    if "student" not in run_config:
        raise CheckpointError(
            "the checkpoint's config has no `student`: only students of stage 1 and of "
            f"distillation are exported; it has {', '.join(sorted(run_config)) or 'nothing'}"
        )
    return config_lib.build(StudentConfig, run_config["student"], path="config.student")


def model_entries(config: ModelConfig) -> list[Entry]:
    """The key map of a model."""
    if isinstance(config, StudentConfig):
        return torch_keys.student_map(config)
    return torch_keys.encoder_map(config)


def encoder_of(config: ModelConfig) -> EncoderConfig:
    """The encoder's config, alone or within a student's."""
    return config.encoder if isinstance(config, StudentConfig) else config


def preprocessing_spec(encoder: EncoderConfig) -> dict[str, Any]:
    """What turns a video file into the model's input."""
    return {
        "color": "RGB",
        "num_frames": encoder.num_frames,
        "sampling": (
            "T = num_frames of a clip of n frames, one from the middle of each segment: "
            "frame i is round(i * (n - 1) / T) + int((n - 1) / T / 2), i = 0 .. T - 1"
        ),
        "image_size": encoder.image_size,
        "resize": "shorter side to image_size, bilinear; then the centre square",
        "scale": 255,
        "mean": list(encoder.pixel_mean),
        "std": list(encoder.pixel_std),
        "layout": "B 3 T H W",
    }


def verify_export(
    folder: str | Path, params: Mapping[str, Any], config: ModelConfig, video: np.ndarray
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
    import jax

    from iv2_jax.models.layers import Precision
    from iv2_jax.models.video_encoder import VideoEncoder

    theirs = _run_folder(Path(folder), np.asarray(video))
    encoder = dataclasses.replace(encoder_of(config), precision=Precision())
    params = params["encoder"] if isinstance(config, StudentConfig) else params
    with jax.default_matmul_precision("highest"):
        out = jax.jit(VideoEncoder(encoder).apply)({"params": params}, encoder.normalize(video))
    pairs = ((out.tokens, theirs[0]), (out.pooled, theirs[1]))
    return max(float(np.abs(np.asarray(ours) - torchs).max()) for ours, torchs in pairs)


def _run_folder(folder: Path, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and pooled features of an exported folder in PyTorch."""
    import torch

    module = _import_file(folder / MODULE_FILE)
    contents = _read_json(folder / CONFIG_FILE)
    model = module.from_config(contents)
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
    frames = module.preprocess(torch.from_numpy(video), _read_json(folder / PREPROCESSING_FILE))
    with torch.no_grad():
        out = model.float().encode(frames)
    return out.tokens.numpy(), out.pooled.numpy()


def _plainest(
    params: Mapping[str, Any], config: ModelConfig
) -> tuple[Mapping[str, Any], ModelConfig]:
    """Takes the encoder out of a student that has nothing else."""
    if isinstance(config, StudentConfig) and not (config.clip or config.mae or config.final_width):
        if set(params) != {"encoder"}:
            raise CheckpointError(
                f"the config has an encoder only, but the parameters hold {sorted(params)}"
            )
        return params["encoder"], config.encoder
    return params, config


def _write_weights(path: Path, tensors: Mapping[str, np.ndarray], weight_format: str) -> None:
    """Writes a flat state dict."""
    if weight_format == "safetensors":
        from safetensors.numpy import save_file

        save_file(dict(tensors), path, metadata={"format": "pt"})
        return
    import torch

    torch.save({key: _torch_tensor(value, torch) for key, value in tensors.items()}, path)


def _torch_tensor(array: np.ndarray, torch: Any) -> Any:
    """A torch tensor of the same dtype; bfloat16, which NumPy lacks, goes through its bits."""
    array = np.array(array)  # owned and writable, which torch wants
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: no such file, or no JSON object.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {path.parent}: not an exported folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, not an object")
    return contents


def _import_file(path: Path) -> Any:
    """Imports a Python file under a name of its own."""
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {path.parent}: not an exported folder")
    spec = importlib.util.spec_from_file_location("iv2_exported_models", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch and typing look modules up by name
    spec.loader.exec_module(module)
    return module
