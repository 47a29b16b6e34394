"""Tables between our parameter trees and the original's PyTorch keys, one file a model family."""

from iv2_jax.interop.entries import Entry, abstract_params, from_torch, to_torch, torch_shapes
from iv2_jax.interop.torch_keys.video import HEADS, encoder_map, student_map, videomae_map

__all__ = [
    "HEADS",
    "Entry",
    "abstract_params",
    "encoder_map",
    "from_torch",
    "student_map",
    "to_torch",
    "torch_shapes",
    "videomae_map",
]
