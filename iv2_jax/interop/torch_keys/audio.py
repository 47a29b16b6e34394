"""Table between our BEATs' parameters and the original's PyTorch keys, used both ways.

Source of the torch names: spec stage2 5.2 and 10. `entries` explains layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from iv2_jax.errors import CheckpointError
from iv2_jax.interop.entries import Entry, Rule, build_entries, with_copies
from iv2_jax.interop.tensor_file import TensorRef
from iv2_jax.interop.torch_keys.rules import dense_rules, norm_rules

if TYPE_CHECKING:
    from iv2_jax.models.audio.beats import BeatsConfig

# What released files hold besides the encoder.
IGNORABLE = {
    r"(audio_encoder\.)?predictor\.(weight|bias)": "classifier of BEATs files tuned on AudioSet",
    r"(audio_encoder\.)?quantizer\..*": "tokenizer of BEATs files, used in their training only",
}

_CONV = "encoder.pos_conv.0."
_RELATIVE_BIAS = "encoder.layers.{}.self_attn.relative_attention_bias.weight"

# Axes of the layouts: D width; C patch width; y x frames and bins of a patch; h d heads and head
# width; M MLP width; k taps, i channels of a group, u one; g values of a gate; R buckets.


def beats_map(config: BeatsConfig, *, path_prefix: str = "", key_prefix: str = "") -> list[Entry]:
    """Lists the entries of the audio encoder (spec stage2 5.2).

    Args:
        config: the encoder's config.
        path_prefix: put before every path of ours, such as `audio_encoder/`.
        key_prefix: put before every torch key, such as `audio_encoder.`.

    Returns:
        Entries in the order of the original's modules. The table of relative biases has a copy in
        every layer but the first.
    """
    sizes = {
        "D": config.width,
        "C": config.patch_width,
        "y": config.patch_size,
        "x": config.patch_size,
        "h": config.num_heads,
        "d": config.width // config.num_heads,
        "M": config.mlp_width,
        "k": config.conv_taps,
        "i": config.width // config.conv_groups,
        "u": 1,
        "g": 8,
        "R": config.num_buckets,
    }
    rules = [
        *(dense_rules("patch_proj", "post_extract_proj", "C", "D") if _has_proj(config) else []),
        ("patch_embed/kernel", "patch_embedding.weight", "y x C -> C 1 y x"),
        *([("patch_embed/bias", "patch_embedding.bias", "C")] if config.patch_bias else []),
        ("pos_conv/bias", f"{_CONV}bias", "D"),
        ("pos_conv/weight_g", f"{_CONV}weight_g", "k u u' -> u u' k"),
        ("pos_conv/weight_v", f"{_CONV}weight_v", "k i D -> D i k"),
        ("relative_bias", _RELATIVE_BIAS.format(0), "R h"),
    ]
    layer = [
        ("attn/gate_scale", "self_attn.grep_a", "h -> 1 h 1 1"),
        *_heads("attn/k", "self_attn.k_proj"),
        *_heads("attn/v", "self_attn.v_proj"),
        *_heads("attn/q", "self_attn.q_proj"),
        ("attn/out/kernel", "self_attn.out_proj.weight", "h d D -> D (h d)"),
        ("attn/out/bias", "self_attn.out_proj.bias", "D"),
        *dense_rules("attn/gate", "self_attn.grep_linear", "d", "g"),
        *norm_rules("attn_norm", "self_attn_layer_norm", "D"),
        *dense_rules("fc1", "fc1", "D", "M"),
        *dense_rules("fc2", "fc2", "M", "D"),
        *norm_rules("mlp_norm", "final_layer_norm", "D"),
    ]
    rules += [(f"layers/{p}", f"encoder.layers.{{}}.{key}", layout) for p, key, layout in layer]
    rules += norm_rules("norm", "encoder.layer_norm", "D")
    rules += norm_rules("patch_norm", "layer_norm", "C")
    entries = build_entries(rules, sizes, config.depth, path_prefix, key_prefix)
    others = [key_prefix + _RELATIVE_BIAS.format(i) for i in range(1, config.depth)]
    return with_copies(entries, {f"{path_prefix}relative_bias": others})


def weight_norm_keys(tensors: Mapping[str, Any], *, key_prefix: str = "") -> Mapping[str, Any]:
    """Gives a state dict the names `weight_g` and `weight_v` of the positional convolution.

    Files of newer PyTorch name them `parametrizations.weight.original0` and `original1`; files
    saved while the original had weight normalisation switched off hold the product, `weight`,
    which is taken apart without changing it (spec stage2 10).

    Args:
        tensors: `{torch key: array}`; may be lazily read, and is not copied.
        key_prefix: prefix of the audio encoder's keys, such as `audio_encoder.`.

    Returns:
        A mapping like `tensors`; `tensors` itself where there is nothing to do.

    Raises:
        CheckpointError: the file has more than one of the three forms.
    """
    start = key_prefix + _CONV
    plain, new = f"{start}weight", f"{start}parametrizations.weight.original"
    forms = [f"{start}weight_g" in tensors, f"{new}0" in tensors, plain in tensors]
    if sum(forms) > 1:
        raise CheckpointError(
            f"the file has more than one form of {plain}: weight_g/weight_v, parametrizations "
            "and the plain weight exclude each other"
        )
    if forms[1]:
        return _Renamed(tensors, {f"{start}weight_g": f"{new}0", f"{start}weight_v": f"{new}1"})
    if forms[2]:
        source = {f"{start}weight_v": plain, f"{start}weight_g": plain}
        return _Renamed(tensors, source, {f"{start}weight_g": _tap_norms})
    return tensors


class _Renamed(Mapping):
    """A mapping with some keys renamed, and some values computed when asked for."""

    def __init__(
        self,
        tensors: Mapping[str, Any],
        source: Mapping[str, str],
        compute: Mapping[str, Any] | None = None,
    ) -> None:
        self._tensors = tensors
        self._source = dict(source)
        self._compute = dict(compute or {})

    def __getitem__(self, key: str) -> Any:
        if key in self._source.values():
            raise KeyError(key)
        value = self._tensors[self._source.get(key, key)]
        return self._compute[key](value) if key in self._compute else value

    def __iter__(self) -> Iterator[str]:
        gone = set(self._source.values())
        yield from (key for key in self._tensors if key not in gone)
        yield from self._source

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _tap_norms(weight: Any) -> Any:
    """Lengths `(1, 1, taps)` of a convolution's weight `(out, in, taps)`, read when asked for."""
    shape = (1, 1, weight.shape[2])
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, weight.dtype)

    def read() -> np.ndarray:
        wide = np.asarray(weight).astype(np.float32)
        return np.sqrt(np.sum(wide * wide, axis=(0, 1), keepdims=True)).astype(weight.dtype)

    return TensorRef(shape, weight.dtype, read)


def _has_proj(config: BeatsConfig) -> bool:
    return config.patch_width != config.width


def _heads(path: str, key: str) -> list[Rule]:
    """Rules of a projection to heads."""
    return [
        (f"{path}/kernel", f"{key}.weight", "D h d -> (h d) D"),
        (f"{path}/bias", f"{key}.bias", "h d -> (h d)"),
    ]
