"""Plain PyTorch BEATs that runs exported weights.

Needs nothing but PyTorch. Parameter names are the original's (spec stage2 5.2), so a released
state dict loads strictly and an exported one loads into the original's class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PositionConv(nn.Module):
    """Grouped convolution whose weight is `g * v / |v|`, one length for each tap."""

    def __init__(self, width: int, taps: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight_g = nn.Parameter(torch.ones(1, 1, taps))
        self.weight_v = nn.Parameter(torch.randn(width, width // groups, taps) * 0.02)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N, D) to what is added to it."""
        taps = self.weight_v.shape[2]
        direction = self.weight_v / self.weight_v.square().sum((0, 1), keepdim=True).sqrt()
        y = F.conv1d(
            x.transpose(1, 2),
            direction * self.weight_g,
            self.bias,
            padding=taps // 2,
            groups=self.groups,
        )
        # An even kernel gives a token too many; the last is dropped.
        return F.gelu(y[:, :, : x.shape[1]]).transpose(1, 2)


class GatedAttention(nn.Module):
    """Self-attention with gated relative biases (spec stage2 5.2.4)."""

    def __init__(self, config: Mapping[str, Any], bias_table: nn.Embedding) -> None:
        super().__init__()
        width, heads = config["width"], config["num_heads"]
        self.num_heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))
        self.relative_attention_bias = bias_table  # one module in all layers

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Maps (B, N, D) to (B, N, D); `bias` is (h, N, N)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        inner, outer = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)
        share = inner[..., None] * (outer[..., None] * self.grep_a - 1.0) + 2.0
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + share * bias
        return self.out_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and MLP, joined to a scaled residual stream and normalised after it."""

    def __init__(self, config: Mapping[str, Any], bias_table: nn.Embedding) -> None:
        super().__init__()
        width = config["width"]
        self.residual_scale = (2.0 * config["depth"]) ** 0.25 if config["deep_norm"] else 1.0
        self.self_attn = GatedAttention(config, bias_table)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config["mlp_width"])
        self.fc2 = nn.Linear(config["mlp_width"], width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Maps (B, N, D) to (B, N, D)."""
        x = self.self_attn_layer_norm(self.residual_scale * x + self.self_attn(x, bias))
        return self.final_layer_norm(
            self.residual_scale * x + self.fc2(F.gelu(self.fc1(x).float()).to(x.dtype))
        )


class Trunk(nn.Module):
    """Positional convolution and layers, the original's `encoder`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["width"]
        self.num_buckets, self.max_distance = config["num_buckets"], config["max_distance"]
        conv = PositionConv(width, config["conv_taps"], config["conv_groups"])
        self.pos_conv = nn.Sequential(conv)
        bias_table = nn.Embedding(self.num_buckets, config["num_heads"])
        self.layers = nn.ModuleList(Layer(config, bias_table) for _ in range(config["depth"]))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N, D) to (B, N, D)."""
        x = self.layer_norm(x + self.pos_conv(x))
        rows = relative_buckets(x.shape[1], self.num_buckets, self.max_distance).to(x.device)
        bias = self.layers[0].self_attn.relative_attention_bias(rows).permute(2, 0, 1)
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Beats(nn.Module):
    """Log-mel spectrogram to tokens (spec stage2 5.2).

    Args:
        config: the exported config: width, depth, num_heads, mlp_width, patch_width, patch_size,
            patch_bias, conv_taps, conv_groups, num_buckets, max_distance, deep_norm.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, patch_width, size = config["width"], config["patch_width"], config["patch_size"]
        self.post_extract_proj = nn.Linear(patch_width, width) if patch_width != width else None
        self.patch_embedding = nn.Conv2d(1, patch_width, size, size, bias=config["patch_bias"])
        self.encoder = Trunk(config)
        self.layer_norm = nn.LayerNorm(patch_width)

    def forward(self, fbank: Tensor) -> Tensor:
        """Encodes (B, frames, mels), normalised log-mel energies, as tokens (B, N, D)."""
        x = self.patch_embedding(fbank[:, None].to(self.patch_embedding.weight.dtype))
        x = self.layer_norm(x.flatten(2).transpose(1, 2))
        return self.encoder(x if self.post_extract_proj is None else self.post_extract_proj(x))


def relative_buckets(num_tokens: int, num_buckets: int, max_distance: int) -> Tensor:
    """Rows (N, N) of the bias table by query and key (spec stage2 5.2.4)."""
    half = num_buckets // 2
    exact = half // 2
    place = torch.arange(num_tokens)
    offset = place[None, :] - place[:, None]
    distance = offset.abs()
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return half * (offset > 0) + torch.where(distance < exact, distance, far)


def from_config(config: Mapping[str, Any]) -> Beats:
    """Builds the model that an exported `config.json` describes, ready for `load_state_dict`.

    Args:
        config: the file's contents; `config["kind"]` is "beats".

    Raises:
        ValueError: `kind` is another.
    """
    if config.get("kind") != "beats":
        raise ValueError(f"config kind must be 'beats', not {config.get('kind')!r}")
    return Beats(config["model"]).eval()
