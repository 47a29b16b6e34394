"""Reads GGUF files of LLaMA-like language models as the same weights in Hugging Face's names.

The package `gguf` reads the header and knows the quantised formats; tensors are read from the file
a block of rows at a time, so no more than one tensor is in memory. llama.cpp stores the rows of
queries and keys in another order (pairs that rotate together stand side by side); here they are
put back to halves.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop.tensor_file import TensorFile, TensorRef, sample

if TYPE_CHECKING:
    from iv2_jax.models.llm import LlmConfig

ENDING = ".gguf"

# Both are blocks of LLaMA's form with queries, keys and values apart and rows in llama.cpp's order.
ARCHITECTURES = ("llama", "internlm2")

_BLOCK = 1 << 20  # values that are dequantised at once

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"  # LLaMA 3.1's stretched frequencies, as numbers


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor stands in the file.

    Attributes:
        shape: its shape, rows first, as in PyTorch.
        kind: name of its GGML type, such as `Q4_1`.
        offset: first byte.
        row_bytes: bytes of a row (of the last axis).
    """

    shape: tuple[int, ...]
    kind: str
    offset: int
    row_bytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself.

    Attributes:
        path: the file.
        metadata: `{key: value}` of plain Python values.
        tensors: `{llama.cpp's name: place}`.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def need(self, key: str) -> Any:
        """A value of the metadata.

        Raises:
            CheckpointError: it is not there.
        """
        if key not in self.metadata:
            raise CheckpointError(f"{self.path} lacks the metadata {key!r}, which the model needs")
        return self.metadata[key]


def read_header(path: str | Path) -> Header:
    """Reads metadata and the list of tensors; the last file's is kept, as reading takes a second.

    Args:
        path: the `.gguf` file.

    Raises:
        CheckpointError: the file is missing, is no GGUF file, is cut off, or is one of several.
        ConfigError: the package `gguf` is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no GGUF file {path}")
    stat = path.stat()
    return _read_header(path, stat.st_mtime_ns, stat.st_size)


def open_gguf(path: str | Path) -> TensorFile:
    """Opens the weights under Hugging Face's names.

    Args:
        path: the `.gguf` file.

    Returns:
        The tensors: float32 where they are quantised, else the dtype they have. Names that the
        table does not know stay as they are.

    Raises:
        CheckpointError: as in `read_header`; another architecture; or a type that `gguf` cannot
            dequantise.
        ConfigError: the package `gguf` is not installed.
    """
    header = read_header(path)
    arch = _architecture(header)
    heads = {
        "attn_q": header.need(f"{arch}.attention.head_count"),
        "attn_k": _kv_heads(header, arch),
    }
    tensors = {}
    for name, stored in header.tensors.items():
        if name == _ROPE_DIVISORS:  # part of the config
            continue
        part = name.split(".")[2] if name.startswith("blk.") else ""
        read = _reader(header.path, name, stored)
        if part in heads and name.endswith(".weight"):
            read = _halves(read, header, name, stored, heads[part])
        tensors[_torch_name(name)] = TensorRef(stored.shape, _dtype(stored.kind), read)
    return TensorFile(header.path, tensors)


def gguf_config(path: str | Path) -> LlmConfig:
    """The language model that a file describes.

    Args:
        path: the `.gguf` file.

    Raises:
        CheckpointError: as in `open_gguf`; or the model has parts that ours has not (experts,
            another stretching of positions, heads that rotate in part).
    """
    from iv2_jax.models.llm import LlmConfig
    from iv2_jax.models.llm_layers import DecoderConfig
    from iv2_jax.models.rope import RopeConfig

    header = read_header(path)
    arch = _architecture(header)

    def value(key: str, default: Any = None) -> Any:
        full = f"{arch}.{key}"
        return header.need(full) if default is None else header.metadata.get(full, default)

    width, heads = value("embedding_length"), value("attention.head_count")
    head_dim = value("attention.key_length", width // heads)
    scaling = value("rope.scaling.type", "none")
    refused = {
        f"{arch}.expert_count={value('expert_count', 0)}": value("expert_count", 0) > 0,
        f"{arch}.rope.scaling.type={scaling!r}": scaling not in ("none", "linear"),
        f"{arch}.rope.dimension_count={value('rope.dimension_count', head_dim)} of heads of "
        f"{head_dim}": value("rope.dimension_count", head_dim) != head_dim,
        f"{arch}.attention.value_length={value('attention.value_length', head_dim)} beside keys "
        f"of {head_dim}": value("attention.value_length", head_dim) != head_dim,
    }
    for what, is_wrong in refused.items():
        if is_wrong:
            raise CheckpointError(f"{header.path}: {what}: this model is not one of ours")
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{header.path} has no token_embd.weight: it is no language model")
    decoder = DecoderConfig(
        width=width,
        depth=value("block_count"),
        num_heads=heads,
        num_kv_heads=_kv_heads(header, arch),
        head_dim=head_dim,
        mlp_width=value("feed_forward_length"),
        # Stored as float32: 1e-5 comes back as 9.9999997e-06.
        norm_epsilon=_short(value("attention.layer_norm_rms_epsilon")),
        rope=RopeConfig(
            theta=_short(value("rope.freq_base", 1e4)),
            scaling=scaling,
            factor=_short(value("rope.scaling.factor", 1.0)) if scaling == "linear" else 1.0,
            divisors=_rope_divisors(header),
        ),
        sliding_window=header.metadata.get(f"{arch}.attention.sliding_window") or None,
    )
    return LlmConfig(
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        decoder=decoder,
        tied_head="output.weight" not in header.tensors,
        context_length=header.metadata.get(f"{arch}.context_length"),
    )


def _library() -> ModuleType:
    """The package `gguf`."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(
            "reading GGUF files needs the package gguf: pip install 'iv2_jax[gguf]'"
        ) from error


@functools.lru_cache(maxsize=1)
def _read_header(path: Path, _mtime: int, size: int) -> Header:
    """The header of a file of that time and size, as plain values: nothing holds the file open."""
    gguf = _library()
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is no GGUF file: it does not begin with 'GGUF'")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the library indexes and decodes without checks of its own
        raise CheckpointError(f"{path} is a damaged or cut-off GGUF file: {error}") from error
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        offset, count = int(tensor.data_offset), int(tensor.n_bytes)
        if offset + count > size:
            raise CheckpointError(f"{path} was cut off: {tensor.name} ends behind its end")
        tensors[tensor.name] = StoredTensor(shape, tensor.tensor_type.name, offset, count // rows)
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts; join them with `llama-gguf-split --merge`"
        )
    return Header(path, metadata, tensors)


def _architecture(header: Header) -> str:
    """The architecture, if it is one of ours."""
    arch = header.need("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{header.path} holds a model of architecture {arch!r}; "
            f"{' and '.join(ARCHITECTURES)} can be read"
        )
    return arch


def _kv_heads(header: Header, arch: str) -> int:
    """Key heads; all layers alike."""
    heads = header.need(f"{arch}.attention.head_count")
    found = header.metadata.get(f"{arch}.attention.head_count_kv", heads)
    if isinstance(found, list):
        if len(set(found)) > 1:
            raise CheckpointError(
                f"{header.path}: {arch}.attention.head_count_kv differs between layers: "
                f"{sample(found)}"
            )
        found = found[0]
    return found


def _torch_name(name: str) -> str:
    """Hugging Face's name of a tensor; an unknown one stays."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _IN_BLOCK:
        return f"model.layers.{parts[1]}.{_IN_BLOCK[parts[2]]}.{parts[3]}"
    return name


def _dtype(kind: str) -> np.dtype:
    """Dtype that a tensor's values are read as."""
    plain = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
    return np.dtype(plain.get(kind, np.float32))


def _reader(path: Path, name: str, stored: StoredTensor) -> Callable[[], np.ndarray]:
    """Reader of one tensor, by blocks of rows."""
    dtype = _dtype(stored.kind)
    plain = stored.kind in ("F32", "F16", "BF16", "F64")
    *lead, columns = stored.shape
    rows = int(np.prod(lead, dtype=np.int64))
    step = max(1, _BLOCK // columns)

    def read() -> np.ndarray:
        out = np.empty((rows, columns), dtype)
        with path.open("rb") as file:
            file.seek(stored.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                raw = np.fromfile(file, np.uint8, count * stored.row_bytes)
                if raw.size != count * stored.row_bytes:
                    raise CheckpointError(f"{path} was cut off while {name} was read")
                raw = raw.reshape(count, stored.row_bytes)
                values = raw.view(dtype) if plain else _dequantised(path, name, stored.kind, raw)
                out[start : start + count] = values
        return out.reshape(stored.shape)

    return read


def _dequantised(path: Path, name: str, kind: str, raw: np.ndarray) -> np.ndarray:
    """Values of quantised rows."""
    gguf = _library()
    try:
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: {name} is of type {kind}, which the package gguf {_version()} cannot read; "
            "a newer one may"
        ) from error


def _version() -> str:
    """Version of the package `gguf`."""
    from importlib.metadata import version

    return version("gguf")


def _halves(
    read: Callable[[], np.ndarray], header: Header, name: str, stored: StoredTensor, heads: int
) -> Callable[[], np.ndarray]:
    """Reader that puts rows which rotate together from side by side to halves of their head."""
    rows, columns = stored.shape
    if rows % (2 * heads):
        raise CheckpointError(f"{header.path}: {name} has {rows} rows for {heads} heads")

    def reordered() -> np.ndarray:
        pairs = read().reshape(heads, rows // heads // 2, 2, columns)
        return pairs.swapaxes(1, 2).reshape(rows, columns)

    return reordered


def _rope_divisors(header: Header) -> tuple[float, ...]:
    """The numbers that divide the rotary frequencies, or none."""
    if _ROPE_DIVISORS not in header.tensors:
        return ()
    stored = header.tensors[_ROPE_DIVISORS]
    return tuple(_short(value) for value in _reader(header.path, _ROPE_DIVISORS, stored)().ravel())


def _short(value: Any) -> float:
    """The shortest decimal number that has the same float32."""
    return float(str(np.float32(value)))
