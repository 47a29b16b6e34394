"""Language models from where they are found: Hugging Face folders, GGUF and llama2.c files.

A folder has `config.json` and its weights in safetensors (or `torch.save`) files, sharded or not;
LLaMA, Mistral and InternLM2 layouts are read. What a config asks for and our decoder does not do
(other activations, biases, quantised weights, unknown stretchings of positions) is refused by
name: a model that is nearly the right one gives nearly the right text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iv2_jax.errors import CheckpointError, nearest
from iv2_jax.interop import gguf_file, llama2c_file, load, run_config

if TYPE_CHECKING:
    from iv2_jax.models.llm import LlmConfig
    from iv2_jax.models.rope import RopeConfig

MODEL_TYPES = ("llama", "mistral", "internlm2")

# Fields that change what is computed -> the one value that is ours, which is also the default.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def is_llm_source(path: str | Path) -> bool:
    """Whether a path is a language model that says itself what it is (by name alone)."""
    path = Path(path)
    if path.is_dir():
        config = path / run_config.CONFIG_FILE
        return config.is_file() and "model_type" in run_config.read_json(config)
    return path.suffix == gguf_file.ENDING


def read_config(path: str | Path) -> LlmConfig:
    """The language model that a folder or file holds, without reading its weights.

    Args:
        path: a Hugging Face folder or a `.gguf` file.

    Raises:
        CheckpointError: there is no such model, it is damaged, or it is none of ours.
        ConfigError: the package `gguf` is needed and not installed.
    """
    path = Path(path)
    if path.suffix == gguf_file.ENDING:
        return gguf_file.gguf_config(path)
    file = path / run_config.CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path} is no language model: neither a folder with {run_config.CONFIG_FILE} nor a "
            f"{gguf_file.ENDING} file"
        )
    return from_hf_config(run_config.read_json(file), str(file))


def load_llm(path: str | Path, *, dtype: Any = np.float32) -> tuple[LlmConfig, dict[str, Any]]:
    """Reads a language model into memory.

    Args:
        path: a Hugging Face folder, a `.gguf` file, or a llama2.c file (`.bin`).
        dtype: of the parameters; None keeps the file's (float32 of quantised ones).

    Returns:
        The config and the nested parameters, NumPy.

    Raises:
        CheckpointError: as in `read_config`, or the weights do not fit the config.
    """
    from iv2_jax.interop import families
    from iv2_jax.interop.entries import from_torch

    path = Path(path)
    if path.is_file() and path.suffix == llama2c_file.ENDING:
        config, tensors = llama2c_file.read_llama2c(path)
    else:
        config, tensors = read_config(path), load.open_tensors(path)
    family = families.of(config)
    tensors, entries = family.to_read(config, tensors)
    ignore = family.ignorable()
    return config, from_torch(tensors, entries, ignore=ignore, dtype=dtype, source=str(path))


def from_hf_config(values: Mapping[str, Any], source: str = "config.json") -> LlmConfig:
    """Our config of the contents of a `config.json`.

    Args:
        values: the contents, of transformers 4 or 5.
        source: what messages call them.

    Raises:
        CheckpointError: a field is missing or has a value that our decoder has not.
    """
    from iv2_jax.models.llm import LlmConfig
    from iv2_jax.models.llm_layers import DecoderConfig

    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(f"{source}: model_type={kind!r}{nearest(str(kind), MODEL_TYPES)}")
    _refuse_unknown(values, source)

    def need(field: str) -> Any:
        if not isinstance(values.get(field), int):
            raise CheckpointError(f"{source} lacks the number {field!r}")
        return values[field]

    heads = need("num_attention_heads")
    head_dim = values.get("head_dim") or need("hidden_size") // heads
    rope = _rope(values, head_dim, source)
    # Dynamic stretching begins where the trained length ends, and has no end of its own.
    bound = None if rope.scaling == "dynamic" else values.get("max_position_embeddings")
    return LlmConfig(
        vocab_size=need("vocab_size"),
        decoder=DecoderConfig(
            width=need("hidden_size"),
            depth=need("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            mlp_width=need("intermediate_size"),
            norm_epsilon=values.get("rms_norm_eps", 1e-6),
            rope=rope,
            sliding_window=values.get("sliding_window") if kind == "mistral" else None,
            fused_qkv=kind == "internlm2",
        ),
        tied_head=bool(values.get("tie_word_embeddings", False)),
        context_length=bound,
    )


def _refuse_unknown(values: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError where a field asks for what our decoder does not do."""
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{source}: hidden_act={activation!r}: only 'silu' can be run")
    for field, ours in _FIXED.items():
        found = values.get(field, ours)
        if found != ours:
            hint = ""
            if field == "quantization_config":
                hint = "; take the weights that are not quantised, or a GGUF file"
            raise CheckpointError(
                f"{source}: {field}={found!r:.80}: only {ours!r} can be run{hint}"
            )
    layers = set(values.get("layer_types") or ())
    if len(layers) > 1:
        raise CheckpointError(
            f"{source}: layer_types mixes {', '.join(sorted(layers))}: only layers that are all "
            "alike can be run"
        )


def _rope(values: Mapping[str, Any], head_dim: int, source: str) -> RopeConfig:
    """Rotary positions, as transformers 4 (`rope_scaling`) or 5 (`rope_parameters`) writes them."""
    from iv2_jax.models.rope import RopeConfig

    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", values.get("rope_theta", 1e4)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        if kind in ("default", "none", None):
            return RopeConfig(theta=theta)
        if kind == "linear":
            return RopeConfig(theta=theta, scaling="linear", factor=float(scaling["factor"]))
        if kind == "dynamic":
            return RopeConfig(
                theta=theta,
                scaling="dynamic",
                factor=float(scaling["factor"]),
                base_length=int(values["max_position_embeddings"]),
            )
        if kind == "llama3":
            return RopeConfig(theta=theta, divisors=_llama3_divisors(scaling, theta, head_dim))
    except KeyError as error:
        raise CheckpointError(f"{source}: rope_scaling of type {kind!r} needs {error}") from None
    raise CheckpointError(
        f"{source}: rope_scaling of type {kind!r}: default, linear, dynamic and llama3 can be run"
    )


def _llama3_divisors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
    """LLaMA 3.1's stretching: low frequencies divided by the factor, high ones kept."""
    factor, low, high = (
        float(scaling[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    trained = float(scaling["original_max_position_embeddings"])
    turns = trained / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple((1.0 / (kept + (1.0 - kept) / factor)).tolist())
