"""Plain PyTorch shot-boundary networks, TransNetV2 and AutoShot, that run exported weights.

Needs nothing but PyTorch. Parameter names are the originals' (spec stage3 13), so a released state
dict loads strictly and an exported one loads into the originals' classes. The file is copied next
to every exported checkpoint and runs there alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHOICES = (3, 8, 8, 8, 13, 12)  # of the architecture search; part of AutoShot's names


class ShotOutput(NamedTuple):
    """Logits (B, T) of each frame.

    Attributes:
        single: is it the middle of a transition? Scenes are cut by this one.
        all: is it anywhere in a transition?
    """

    single: Tensor
    all: Tensor


class Separable(nn.Module):
    """Spatial 1x3x3 convolution, unless shared with others, and a dilated temporal 3x1x1 one."""

    def __init__(self, in_width: int, inner: int, out_width: int, dilation: int, own: bool) -> None:
        super().__init__()
        temporal = nn.Conv3d(
            inner,
            out_width,
            (3, 1, 1),
            dilation=(dilation, 1, 1),
            padding=(dilation, 0, 0),
            bias=False,
        )
        self.layers = nn.ModuleList([_spatial(in_width, inner)] if own else [])
        self.layers.append(temporal)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, C', T, H, W)."""
        for layer in self.layers:
            x = layer(x)
        return x


class TransNetLayer(nn.Module):
    """Dilated branches in TransNetV2's names; `layer` is a layer of config.json."""

    def __init__(self, in_width: int, layer: Mapping[str, Any]) -> None:
        super().__init__()
        if layer["shared"]:
            raise ValueError("TransNetV2 has no names for a shared spatial convolution")
        for i, width in enumerate(layer["branches"]):
            branch = Separable(in_width, layer["inner"], width, 2**i, own=True)
            self.add_module(f"Conv3D_{2**i}", branch)
        self.bn = nn.BatchNorm3d(sum(layer["branches"]), eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, C', T, H, W), rectified."""
        branches = [m(x) for name, m in self.named_children() if name != "bn"]
        return F.relu(self.bn(torch.cat(branches, dim=1)))


class AutoShotLayer(nn.Module):
    """Dilated branches in AutoShot's names; `layer` is a layer of config.json."""

    def __init__(self, in_width: int, layer: Mapping[str, Any]) -> None:
        super().__init__()
        inner, shared = layer["inner"], layer["shared"]
        self.share = _spatial(in_width, inner) if shared else None
        self.conv_blocks = nn.ModuleList(
            Separable(in_width, inner, width, 2**i, own=not shared)
            for i, width in enumerate(layer["branches"])
        )
        self.batch_norm = nn.BatchNorm3d(sum(layer["branches"]), eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, C', T, H, W), rectified."""
        if self.share is not None:
            x = self.share(x)
        return F.relu(self.batch_norm(torch.cat([b(x) for b in self.conv_blocks], dim=1)))


class Wrapped(nn.Module):
    """A linear map whose parameters AutoShot names `linear.weight` and `linear.bias`."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_width, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps the last axis."""
        return self.linear(x)


class Stage(nn.Module):
    """Two layers in TransNetV2's names."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.DDCNN = nn.ModuleList([first, second])


class FrameSimilarity(nn.Module):
    """Cosine similarity of each frame with those around it, from the means of the stages."""

    def __init__(self, linear: type[nn.Module], means: int, width: int, lookup: int) -> None:
        super().__init__()
        self.projection = linear(means, width)
        self.fc = linear(lookup, width)
        self.lookup = lookup

    def forward(self, means: Tensor) -> Tensor:
        """(B, T, means) to (B, T, width)."""
        x = F.normalize(self.projection(means), dim=-1)
        return F.relu(self.fc(looked_up(x, self.lookup)))


class ColorHistograms(nn.Module):
    """The same of histograms with 8 x 8 x 8 boxes of colour."""

    def __init__(self, linear: type[nn.Module], width: int, lookup: int) -> None:
        super().__init__()
        self.fc = linear(lookup, width)
        self.lookup = lookup

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) in 0..255 to (B, T, width)."""
        x = F.normalize(color_histogram(frames).to(next(self.parameters()).dtype), dim=-1)
        return F.relu(self.fc(looked_up(x, self.lookup)))


class ShotNet(nn.Module):
    """Both networks; `config` is the `model` part of config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.autoshot = config["key_style"] == "autoshot"
        linear = Wrapped if self.autoshot else nn.Linear
        kind = AutoShotLayer if self.autoshot else TransNetLayer
        layers, widths, in_width = [], [], 3
        for layer in config["layers"]:
            layers.append(kind(in_width, layer))
            in_width = sum(layer["branches"])
            widths.append(in_width)
        if self.autoshot:
            self.names = [f"Layer_{i}_{_CHOICES[i]}" for i in range(len(layers))]
            for name, layer in zip(self.names, layers, strict=True):
                self.add_module(name, layer)
        else:
            pairs = zip(layers[::2], layers[1::2], strict=True)
            self.SDDCNN = nn.ModuleList(Stage(first, second) for first, second in pairs)
        stages, width, hidden = len(layers) // 2, config["similarity_width"], config["hidden"]
        cells = (config["frame_height"] >> stages) * (config["frame_width"] >> stages)
        head = 2 * width + cells * widths[-1]
        if self.autoshot:
            self.fc1_0 = linear(head, hidden)
            self.fc1 = linear(head + hidden, hidden)  # in the files, but never used
        else:
            self.fc1 = linear(head, hidden)
        self.dropout = nn.Dropout(config["dropout"])
        self.cls_layer1 = linear(hidden, 1)
        self.cls_layer2 = linear(hidden, 1)
        lookup = config["lookup"]
        self.frame_sim_layer = FrameSimilarity(linear, sum(widths[1::2]), width, lookup)
        self.color_hist_layer = ColorHistograms(linear, width, lookup)

    def forward(self, frames: Tensor) -> ShotOutput:
        """Judges every frame of (B, T, H, W, 3), RGB, uint8 or float in 0..255."""
        x = frames.permute(0, 4, 1, 2, 3).to(next(self.cls_layer1.parameters()).dtype) / 255
        means = []
        for first, second in self._stages():
            x = first(x)
            x = F.avg_pool3d(x + second(x), (1, 2, 2))
            means.append(x.mean(dim=(3, 4)).transpose(1, 2))
        flat = x.permute(0, 2, 3, 4, 1).flatten(2)
        similar = self.frame_sim_layer(torch.cat(means, dim=-1))
        x = torch.cat([self.color_hist_layer(frames), similar, flat], dim=-1)
        x = self.dropout(F.relu(self.fc1_0(x) if self.autoshot else self.fc1(x)))
        return ShotOutput(self.cls_layer1(x)[..., 0], self.cls_layer2(x)[..., 0])

    def _stages(self) -> list[tuple[nn.Module, nn.Module]]:
        """The layers, two a stage."""
        if not self.autoshot:
            return [(stage.DDCNN[0], stage.DDCNN[1]) for stage in self.SDDCNN]
        layers = [getattr(self, name) for name in self.names]
        return list(zip(layers[::2], layers[1::2], strict=True))


def color_histogram(frames: Tensor) -> Tensor:
    """Pixels of each frame (B, T, H, W, 3) in 8 x 8 x 8 boxes of colour: (B, T, 512) counts."""
    batch, length = frames.shape[:2]
    color = frames.long() >> 5
    box = (color[..., 0] << 6) | (color[..., 1] << 3) | color[..., 2]
    box = box.reshape(batch * length, -1)
    counts = torch.zeros(batch * length, 512, dtype=torch.long, device=frames.device)
    counts.scatter_add_(1, box, torch.ones_like(box))
    return counts.reshape(batch, length, 512)


def looked_up(x: Tensor, lookup: int) -> Tensor:
    """Products of each frame's vector with its neighbours': (B, T, C) to (B, T, lookup)."""
    reach = lookup // 2
    products = F.pad(x @ x.transpose(1, 2), (reach, reach))
    index = torch.arange(x.shape[1], device=x.device)[:, None] + torch.arange(
        lookup, device=x.device
    )
    return products.gather(2, index.expand(x.shape[0], -1, -1))


def from_config(config: Mapping[str, Any]) -> ShotNet:
    """Builds the model that an exported `config.json` describes, ready for `load_state_dict`.

    Args:
        config: the file's contents; `config["kind"]` is "shots".

    Raises:
        ValueError: `kind` is another.
    """
    if config.get("kind") != "shots":
        raise ValueError(f"config kind must be 'shots', not {config.get('kind')!r}")
    return ShotNet(config["model"]).eval()


def _spatial(in_width: int, out_width: int) -> nn.Conv3d:
    """A 1x3x3 convolution as large as its input."""
    return nn.Conv3d(in_width, out_width, (1, 3, 3), padding=(0, 1, 1), bias=False)
