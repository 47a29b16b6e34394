"""Plain PyTorch classifiers: the video encoder with the fine-tuning and probing heads.

Needs nothing but PyTorch and `video.py` beside it. Parameter names are the original's (spec stage1
8), so a released state dict loads strictly and an exported one loads into the original's classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .video import Mlp, VideoEncoder


class Classifier(VideoEncoder):
    """Video encoder and classification head (spec stage1 2.7-2.9).

    Args:
        config: the exported classifier config: `encoder`, `num_classes`, `head` ('plain', 'ap',
            'cls_avg1', 'cls_avgN', 'cls_avg1_proj' or 'cls_avgN_proj'), `merge_norm` ('LN', 'BN' or
            'kaiming_BN') and `dropout`.
        fused_attention: as in `VideoEncoder`.
    """

    def __init__(self, config: Mapping[str, Any], *, fused_attention: bool = True) -> None:
        super().__init__(config["encoder"], fused_attention=fused_attention)
        pooled, kind = config["encoder"]["pool_width"], config["head"]
        self.merges, self.by_frame = kind.startswith("cls_"), kind.startswith("cls_avgN")
        self.with_pooled = not self.merges or kind.endswith("_proj")
        self.channels_first = config["merge_norm"] != "LN"
        self.extra_mlp = None
        if kind == "ap":
            self.extra_mlp = nn.Sequential(nn.LayerNorm(pooled), Mlp(pooled, 4 * pooled, False))
        self.fc_norm = nn.LayerNorm(pooled)
        width = pooled if self.with_pooled else 0
        if self.merges:
            size = pooled if self.by_frame else self.width
            self.down = nn.Identity()
            if self.by_frame:
                self.down = nn.Sequential(nn.Linear(self.width, pooled), nn.GELU())
            self.down_norm = _norm(config["merge_norm"], size)
            width += size * (1 + (self.grid[0] if self.by_frame else 1))
        self.fc_dropout = nn.Dropout(config["dropout"])
        self.head = nn.Linear(width, config["num_classes"])

    def forward(self, video: Tensor) -> Tensor:
        """Classifies normalised clips (B, 3, T, H, W): logits (B, num_classes)."""
        encoded = self.encode(video)
        pooled = encoded.pooled
        if self.extra_mlp is not None:
            pooled = pooled + self.extra_mlp(pooled)
        features = [self.merge(encoded.tokens)] if self.merges else []
        features += [self.fc_norm(pooled)] if self.with_pooled else []
        return self.head(self.fc_dropout(torch.cat(features, dim=-1)))

    def merge(self, tokens: Tensor) -> Tensor:
        """Class token and mean patch tokens of (B, N, D), normalised and flattened."""
        cells = self.grid[1] * self.grid[2] if self.by_frame else tokens.shape[1] - 1
        means = tokens[:, 1:].unflatten(1, (-1, cells)).mean(dim=2)
        x = self.down(torch.cat([tokens[:, :1], means], dim=1))
        # Batch norms see (B, features, tokens), and the head reads it flattened so.
        return self.down_norm(x.transpose(1, 2) if self.channels_first else x).flatten(1)


def _norm(kind: str, width: int) -> nn.Module:
    """The norm of the merged tokens."""
    if kind == "LN":
        return nn.LayerNorm(width)
    if kind == "BN":
        return nn.BatchNorm1d(width)
    return nn.BatchNorm1d(width, affine=False, eps=1e-6)


def from_config(config: Mapping[str, Any], *, fused_attention: bool = True) -> Classifier:
    """Builds the model that an exported `config.json` describes, ready for `load_state_dict`.

    Args:
        config: the file's contents; `config["kind"]` is "classifier".
        fused_attention: as in `VideoEncoder`.

    Raises:
        ValueError: `kind` is another.
    """
    if config.get("kind") != "classifier":
        raise ValueError(f"config kind must be 'classifier', not {config.get('kind')!r}")
    return Classifier(config["model"], fused_attention=fused_attention).eval()
