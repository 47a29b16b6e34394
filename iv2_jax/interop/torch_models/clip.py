"""Plain PyTorch modules that run exported CLIP models: video encoder, text tower, temperature.

Needs nothing but PyTorch. Parameter names are the original's (spec stage2 7 and 10), so a released
state dict loads strictly and an exported one loads into the original's classes. `video.py` and
`llm.py` must stand beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .llm import AdaptedLinear, Decoder
from .video import VideoEncoder


class ClipOutput(NamedTuple):
    """What `Clip.forward` returns.

    Attributes:
        vision: (B, C) video features, no unit length yet.
        text: (B', C) text features, no unit length yet.
        similarity: (B, B') cosine similarities over the temperature.
    """

    vision: Tensor
    text: Tensor
    similarity: Tensor


class MobileAttention(nn.Module):
    """Self-attention with biases, causal or over all tokens."""

    def __init__(self, width: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attends among the tokens of (B, N, D)."""
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv_proj(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MobileBlock(nn.Module):
    """Pre-norm residual block; the gaps in the numbering are the original's dropouts."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, causal: bool) -> None:
        super().__init__()
        self.pre_norm_mha = nn.Sequential(
            nn.LayerNorm(width), MobileAttention(width, num_heads, causal)
        )
        self.pre_norm_ffn = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, mlp_width),
            nn.GELU(),
            nn.Identity(),
            nn.Linear(mlp_width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N, D) to (B, N, D)."""
        x = x + self.pre_norm_mha(x)
        return x + self.pre_norm_ffn(x)


class Positions(nn.Module):
    """Learned positions, resized linearly for texts of another length."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 1, length, width))

    def forward(self, length: int) -> Tensor:
        """Gives (1, length, D)."""
        table = self.pos_embed[0]
        if length == table.shape[1]:
            return table
        return F.interpolate(table.transpose(1, 2), size=length, mode="linear").transpose(1, 2)


class PositionalEmbedding(nn.Module):
    """The original's extra level of naming."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.pos_embed = Positions(length, width)


class MobileClipText(nn.Module):
    """MobileCLIP-B's text tower: the feature is that of the largest id, the end token's.

    Args:
        config: vocab_size, context_length, width, mlp_widths, num_heads, out_width, causal.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["width"]
        self.embedding_layer = nn.Embedding(config["vocab_size"], width)
        self.positional_embedding = PositionalEmbedding(config["context_length"], width)
        self.transformer = nn.ModuleList(
            MobileBlock(width, heads, mlp_width, config["causal"])
            for heads, mlp_width in zip(config["num_heads"], config["mlp_widths"], strict=True)
        )
        self.final_layer_norm = nn.LayerNorm(width)
        self.projection_layer = nn.Parameter(torch.zeros(width, config["out_width"]))

    def forward(self, ids: Tensor) -> Tensor:
        """Encodes int (B, N) ids into (B, C)."""
        x = self.embedding_layer(ids) + self.positional_embedding.pos_embed(ids.shape[1])
        for block in self.transformer:
            x = block(x)
        x = self.final_layer_norm(x)
        return x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ self.projection_layer


class WrappedLinear(nn.Module):
    """An adapted linear map, named as peft has named it since 0.6."""

    def __init__(self, adapted: AdaptedLinear) -> None:
        super().__init__()
        self.base_layer = nn.Linear(adapted.in_features, adapted.out_features, bias=False)
        self.lora_A, self.lora_B = adapted.lora_A, adapted.lora_B
        self.dropout, self.scale = adapted.dropout, adapted.scale

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., inputs) to (..., outputs)."""
        down, up = self.lora_A["default"], self.lora_B["default"]
        adapted = up(down(self.dropout(x.to(down.weight.dtype)))) * self.scale
        return (self.base_layer(x) + adapted).to(x.dtype)


class LlamaClipText(nn.Module):
    """The 7B tower of InternVL-C: the feature is that of the last token that is no padding.

    Args:
        config: vocab_size, out_width and `decoder`: width, depth, num_heads, num_kv_heads,
            head_dim, mlp_width, norm_epsilon, rope, lora, lora_targets.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        decoder = config["decoder"]
        self.transformer = Decoder(decoder, config["vocab_size"])
        for module in list(self.transformer.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, AdaptedLinear):
                    setattr(module, name, WrappedLinear(child))
        self.text_projection = nn.Parameter(torch.zeros(decoder["width"], config["out_width"]))

    def forward(self, ids: Tensor) -> Tensor:
        """Encodes int (B, N) ids, padded with 0 on the right, into (B, C)."""
        real = ids > 0
        # Padding is numbered on; what comes out there is never pooled.
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x, _ = self.transformer(self.transformer.embed(ids), real, positions)
        return x[torch.arange(len(ids)), real.sum(dim=1) - 1] @ self.text_projection


class Clip(nn.Module):
    """A large or a small CLIP model.

    Args:
        config: the exported config: `vision`, `text`, `temp_init`, `temp_min`.
        fused_attention: as in `VideoEncoder`.
    """

    def __init__(self, config: Mapping[str, Any], *, fused_attention: bool = True) -> None:
        super().__init__()
        vision, text = config["vision"], config["text"]
        self.temp_min = config["temp_min"]
        self.temp = nn.Parameter(torch.tensor(float(config["temp_init"])))
        self.vision_encoder = VideoEncoder(vision, fused_attention=fused_attention)
        self.text_encoder = self._text(text)
        self.vision_align = self._align(vision["pool_width"], text["out_width"])

    def _text(self, config: Mapping[str, Any]) -> nn.Module:
        return LlamaClipText(config)

    def _align(self, width: int, out_width: int) -> nn.Module:
        return nn.Identity()

    def forward(self, video: Tensor, ids: Tensor) -> ClipOutput:
        """Compares videos (B, 3, T, H, W), normalised pixels, with texts, ids (B', N)."""
        vision, text = self.encode_vision(video), self.encode_text(ids)
        cosine = F.normalize(vision, dim=-1) @ F.normalize(text, dim=-1).T
        # The floor is written into the parameter in the original: the gradient passes it by.
        temp = self.temp + (self.temp.clamp(min=self.temp_min) - self.temp).detach()
        return ClipOutput(vision, text, cosine / temp)

    def encode_vision(self, video: Tensor) -> Tensor:
        """Encodes videos (B, 3, T, H, W), or images as videos of one frame, into (B, C)."""
        return self.vision_align(self.vision_encoder(video))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Encodes texts (B, N) into (B, C)."""
        return self.text_encoder(ids)


class SmallClip(Clip):
    """CLIP with MobileCLIP's text tower and a map from the pooled video to its width."""

    def _text(self, config: Mapping[str, Any]) -> nn.Module:
        return MobileClipText(config)

    def _align(self, width: int, out_width: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out_width))


def from_config(config: Mapping[str, Any], *, fused_attention: bool = True) -> nn.Module:
    """Builds the model that an exported `config.json` describes, ready for `load_state_dict`.

    Args:
        config: the file's contents; `config["kind"]` is one of the kinds below.
        fused_attention: as in `VideoEncoder`.

    Raises:
        ValueError: `kind` is another.
    """
    kind, model = config.get("kind"), config["model"]
    if kind in _TEXTS:
        return _TEXTS[kind](model).eval()
    if kind not in _MODELS:
        raise ValueError(f"config kind must be one of {sorted(_MODELS | _TEXTS)}, not {kind!r}")
    return _MODELS[kind](model, fused_attention=fused_attention).eval()


_MODELS = {"clip": Clip, "clip_small": SmallClip}
_TEXTS = {"mobileclip": MobileClipText, "llama_clip": LlamaClipText}
