"""Plain PyTorch modules that run exported weights: the video encoder and the alignment student.

Needs nothing but PyTorch: no flash attention, apex or timm. Parameter names are the original's
(spec stage1 8), so a released state dict loads strictly and an exported one loads into the
original's classes. The file is copied next to every exported checkpoint and runs there alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EncoderOutput(NamedTuple):
    """What `VideoEncoder.encode` returns.

    Attributes:
        tokens: (B, N', D) residual stream after the last block; N' counts the visible tokens.
        pooled: (B, pool_width) output of the attention pool, or None without one.
        pool_attention: (B, N') attention of the pool, averaged over heads, or None.
        features: residual streams (B, N', D) after the asked-for blocks, ascending.
    """

    tokens: Tensor
    pooled: Tensor | None
    pool_attention: Tensor | None
    features: list[Tensor]


class StudentOutput(NamedTuple):
    """What `Student.forward` returns: the original's three outputs and the weights of cells.

    Attributes:
        clip: (K, B, N', C) or None; N' is the number of the teacher's tokens if its grid differs.
        final: (B, C) or None.
        mae: (K, B, N', C) or None.
        clip_weight: (B, N') 1 where a cell of the teacher's has a visible token, or None if the
            grids agree.
        mae_weight: the same for `mae`.
        tokens: (B, N', D) the encoder's tokens.
        pooled: (B, pool_width) the encoder's pooled vector, or None.
    """

    clip: Tensor | None
    final: Tensor | None
    mae: Tensor | None
    clip_weight: Tensor | None = None
    mae_weight: Tensor | None = None
    tokens: Tensor | None = None
    pooled: Tensor | None = None


class RMSNorm(nn.Module):
    """x / rms(x) * weight with eps 1e-6, computed in float32 (spec stage1 2.4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class LayerScale(nn.Module):
    """Multiplies a branch by a learnt vector."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        """Scales the last axis."""
        return x * self.gamma.to(x.dtype)


class DropPath(nn.Module):
    """Drops a branch of whole samples in training and rescales the kept ones."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Keeps each sample of (B, ...) with probability 1 - rate."""
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1.0 - self.rate)


class Attention(nn.Module):
    """Self-attention with RMS norms of q and k over the whole width (spec stage1 2.4)."""

    def __init__(self, config: Mapping[str, Any], fused: bool) -> None:
        super().__init__()
        width = config["width"]
        self.num_heads = config["num_heads"]
        self.fused = fused
        self.qkv = nn.Linear(width, 3 * width, bias=config["qkv_bias"])
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(width) if config["qk_norm"] else nn.Identity()
        self.k_norm = RMSNorm(width) if config["qk_norm"] else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Attends among the tokens of (B, N, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_norm(q), self.k_norm(k), v)
        )
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            mixed = scores.softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around a GELU, tanh-approximate or exact (spec stage1 2.6)."""

    def __init__(self, width: int, hidden: int, tanh_gelu: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh" if tanh_gelu else "none")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., D)."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm residual block with LayerScale and DropPath (spec stage1 2.4)."""

    def __init__(self, config: Mapping[str, Any], drop_path: float, fused: bool) -> None:
        super().__init__()
        width, scale = config["width"], config["layer_scale_init"]
        self.norm1 = RMSNorm(width)
        self.attn = Attention(config, fused)
        self.ls1 = LayerScale(width, scale)
        self.norm2 = RMSNorm(width)
        self.mlp = Mlp(width, config["mlp_width"], config["tanh_gelu"])
        self.ls2 = LayerScale(width, scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N, D) to (B, N, D)."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbed(nn.Module):
    """Cuts (B, 3, T, H, W) into patches: (B, N, D), time-major, then row, then column."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        size = (config["tubelet"], config["patch_size"], config["patch_size"])
        self.proj = nn.Conv3d(3, config["width"], kernel_size=size, stride=size)

    def forward(self, video: Tensor) -> Tensor:
        """Embeds the patches."""
        return self.proj(video.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention of one query vector over the tokens, with biases apart from the weights."""

    def __init__(self, width: int, num_heads: int, out_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.k_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, out_width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (B, 1, out_width) and the attention (B, heads, 1, N)."""
        q = F.linear(query, self.q.weight, self.q_bias)
        k = F.linear(key, self.k.weight, self.k_bias)
        v = F.linear(value, self.v.weight, self.v_bias)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), weights


class AttentionPool(nn.Module):
    """The original's "clip_projector": the mean token asks all tokens (spec stage1 2.5)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = config["width"]
        self.norm1_q = nn.LayerNorm(width)
        self.norm1_k = nn.LayerNorm(width)
        self.norm1_v = nn.LayerNorm(width)
        self.cross_attn = CrossAttention(width, config["pool_heads"], config["pool_width"])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, N, D) to the pooled (B, P) and the head-averaged attention (B, N)."""
        query = self.norm1_q(x.mean(dim=1, keepdim=True))
        pooled, weights = self.cross_attn(query, self.norm1_k(x), self.norm1_v(x))
        return pooled[:, 0], weights.mean(dim=1)[:, 0]


class VideoEncoder(nn.Module):
    """The video transformer (spec stage1 2).

    Args:
        config: the exported encoder config: width, depth, num_heads, mlp_width, patch_size,
            tubelet, image_size, num_frames, pool_heads, pool_width, qkv_bias, qk_norm,
            layer_scale_init, drop_path_rate, separable_positions, image_positions, pool,
            tanh_gelu.
        fused_attention: use `scaled_dot_product_attention` instead of the plain softmax.
    """

    block = Block  # class of the blocks

    def __init__(self, config: Mapping[str, Any], *, fused_attention: bool = True) -> None:
        super().__init__()
        self.grid = encoder_grid(config)
        self.width = config["width"]
        self.separable = config["separable_positions"]
        self.images = config.get("image_positions", "none")
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(_table(1, 1, self.width))
        self._add_positions("pos_embed", with_cls=True)
        depth = config["depth"]
        rates = torch.linspace(0.0, config["drop_path_rate"], depth).tolist()
        self.blocks = nn.ModuleList(self.block(config, rate, fused_attention) for rate in rates)
        self.clip_projector = AttentionPool(config) if config.get("pool", True) else None

    def forward(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pools a normalised video (B, 3, T, H, W) into (B, pool_width), None without a pool.

        Args:
            video: normalised pixels.
            mask: bool (B, N), True = dropped; column 0 is the class token and always False.
                Every row must keep the same number. None keeps all tokens.
        """
        return self.encode(video, mask).pooled

    def encode(
        self, video: Tensor, mask: Tensor | None = None, layers: Sequence[int] = ()
    ) -> EncoderOutput:
        """Runs the encoder and returns tokens, pooled features and the blocks in `layers`."""
        x = self.patch_embed(video)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        is_image = self.is_image(video)
        table = self.positions("pos_embed", with_cls=True, is_image=is_image)
        x = visible_tokens(x + table, mask)
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in layers:
                features.append(x)
        pooled = (None, None) if self.clip_projector is None else self.clip_projector(x)
        return EncoderOutput(x, *pooled, features)

    def is_image(self, video: Tensor) -> bool:
        """Whether (B, 3, T, H, W) is placed as an image (spec stage2 2)."""
        return video.shape[2] == 1 and self.images != "none"

    def positions(self, name: str, *, with_cls: bool, is_image: bool = False) -> Tensor:
        """Gives a position table (1, N, D), joint or put together from its separable parts.

        An image has a table of its own, the mean of the joint one over time, or the spatial one.
        """
        if not self.separable:
            if not is_image:
                return getattr(self, name)
            if self.images == "own":
                return getattr(self, _image_name(name))
            table, split = getattr(self, name), int(with_cls)
            mean = table[:, split:].unflatten(1, (self.grid[0], -1)).mean(dim=1)
            return torch.cat([table[:, :split], mean], dim=1)
        table = getattr(self, f"{name}_spatial")
        if not is_image:
            temporal = getattr(self, f"{name}_temporal")
            table = (temporal[:, :, None] + table[:, None]).flatten(1, 2)
        return torch.cat([getattr(self, f"{name}_cls"), table], dim=1) if with_cls else table

    def _add_positions(self, name: str, *, with_cls: bool) -> None:
        """Registers the parameters of a position table."""
        frames, patches = self.grid[0], self.grid[1] * self.grid[2]
        sizes = {name: frames * patches + with_cls}
        if self.images == "own":
            sizes[_image_name(name)] = patches + with_cls
        if self.separable:
            sizes = {f"{name}_spatial": patches, f"{name}_temporal": frames}
            sizes |= {f"{name}_cls": 1} if with_cls else {}
        for table, size in sizes.items():
            self.register_parameter(table, nn.Parameter(_table(1, size, self.width)))


class LinearDecoder(nn.Module):
    """Linear, LayerNorm, unit length (spec stage1 3.2)."""

    def __init__(self, width: int, out_width: int, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.head = nn.Linear(width, out_width)
        self.norm = nn.LayerNorm(out_width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., C)."""
        x = self.norm(self.head(x))
        return x / x.norm(dim=-1, keepdim=True) if self.normalize else x


class MlpDecoder(LinearDecoder):
    """Linear, exact GELU, linear, LayerNorm, unit length (spec stage1 3.2)."""

    def __init__(self, width: int, out_width: int, normalize: bool) -> None:
        super().__init__(width, out_width, normalize)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out_width))


class Student(VideoEncoder):
    """Video encoder with alignment decoders: stage 1 and the distilled models (spec stage1 3, 5).

    Called with a mask it gives the original's outputs; `encode` gives the plain encoder's, which
    is what a downstream user of the features wants.

    Args:
        config: the exported student config: `encoder`, `clip` and `mae` (each None or width,
            layers, decoder, has_cls, grid), `final_width`, `final_decoder`, `normalize`.
        fused_attention: as in `VideoEncoder`.
    """

    def __init__(self, config: Mapping[str, Any], *, fused_attention: bool = True) -> None:
        super().__init__(config["encoder"], fused_attention=fused_attention)
        self.branches = {name: config[name] for name in ("clip", "mae") if config[name]}
        self.final_width = config["final_width"]
        pool_width, normalize = config["encoder"]["pool_width"], config["normalize"]
        for name, branch in self.branches.items():
            self._add_positions(f"{name}_pos_embed", with_cls=branch["has_cls"])
            decoder = _DECODERS[branch["decoder"]]
            decoders = [decoder(self.width, branch["width"], normalize) for _ in branch["layers"]]
            self.add_module(f"{name}_decoder", nn.ModuleList(decoders))
        if self.final_width:
            decoder = _DECODERS[config["final_decoder"]]
            self.final_clip_decoder = decoder(pool_width, self.final_width, normalize)

    def forward(self, video: Tensor, mask: Tensor | None = None) -> StudentOutput:
        """Decodes the visible tokens into the teachers' spaces.

        Args:
            video: (B, 3, T, H, W) normalised pixels.
            mask: bool (B, N), True = dropped, as in `VideoEncoder.forward`.
        """
        depth = len(self.blocks)
        wanted = {
            name: [layer % depth for layer in branch["layers"]]
            for name, branch in self.branches.items()
        }
        layers = sorted({layer for group in wanted.values() for layer in group})
        encoded = self.encode(video, mask, layers)
        if mask is None:
            mask = torch.zeros(encoded.tokens.shape[:2], dtype=torch.bool, device=video.device)
        aligned = {}
        for name, group in wanted.items():
            features = torch.stack([encoded.features[layers.index(layer)] for layer in group])
            aligned[name] = self._align(name, features, mask, self.is_image(video))
        final = self.final_clip_decoder(encoded.pooled) if self.final_width else None
        clip, clip_weight = aligned.get("clip", (None, None))
        mae, mae_weight = aligned.get("mae", (None, None))
        return StudentOutput(
            clip, final, mae, clip_weight, mae_weight, encoded.tokens, encoded.pooled
        )

    def _align(
        self, name: str, features: Tensor, mask: Tensor, is_image: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Adds positions to (K, B, N', D), pools to the teacher's cells if need be, decodes."""
        branch = self.branches[name]
        has_cls, own = branch["has_cls"], self.grid
        grid = tuple(branch["grid"] or own)
        if is_image:  # the teacher sees an image as one frame too
            own, grid = (1, *own[1:]), (1, *grid[1:])
        if not has_cls:
            features = features[:, :, 1:]
        table = self.positions(f"{name}_pos_embed", with_cls=has_cls, is_image=is_image)
        features = features + visible_tokens(
            table.expand(mask.shape[0], -1, -1), mask if has_cls else mask[:, 1:]
        )
        weight = None
        if grid != own:
            cls, patches = features[:, :, : int(has_cls)], features[:, :, int(has_cls) :]
            shares, weight = cell_shares(mask[:, 1:], own, grid)
            cells = torch.einsum("bcm,kbmd->kbcd", shares.to(patches.dtype), patches)
            features = torch.cat([cls, cells], dim=2)
            weight = F.pad(weight, (int(has_cls), 0), value=1.0)
        decoders = getattr(self, f"{name}_decoder")
        return torch.stack(
            [decode(x) for decode, x in zip(decoders, features, strict=True)]
        ), weight


_DECODERS = {"linear": LinearDecoder, "mlp": MlpDecoder}


def from_config(config: Mapping[str, Any], *, fused_attention: bool = True) -> VideoEncoder:
    """Builds the model that an exported `config.json` describes, ready for `load_state_dict`.

    Args:
        config: the file's contents; `config["kind"]` is "encoder" or "student".
        fused_attention: as in `VideoEncoder`.

    Raises:
        ValueError: `kind` is another.
    """
    kinds = {"encoder": VideoEncoder, "student": Student}
    if config.get("kind") not in kinds:
        raise ValueError(f"config kind must be one of {sorted(kinds)}, not {config.get('kind')!r}")
    return kinds[config["kind"]](config["model"], fused_attention=fused_attention).eval()


def preprocess(frames: Tensor, spec: Mapping[str, Any]) -> Tensor:
    """Turns uint8 frames (B, T, H, W, 3), RGB, into the model's input (B, 3, T, H, W).

    Args:
        frames: already sampled, cropped and resized as `spec` (preprocessing.json) says.
        spec: the file's contents.
    """
    mean = torch.tensor(spec["mean"], device=frames.device)
    std = torch.tensor(spec["std"], device=frames.device)
    return ((frames.float() / 255.0 - mean) / std).permute(0, 4, 1, 2, 3)


def encoder_grid(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Patches of a clip along time, height and width."""
    side = config["image_size"] // config["patch_size"]
    return config["num_frames"] // config["tubelet"], side, side


def _image_name(name: str) -> str:
    """Name of the position table of images beside that of clips."""
    return name.removesuffix("pos_embed") + "img_pos_embed"


def visible_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Keeps the tokens of (B, N, D) whose mask is False; every row must keep the same number."""
    if mask is None:
        return x
    return x[~mask].reshape(x.shape[0], -1, x.shape[-1])


def cell_shares(
    mask: Tensor, from_grid: tuple[int, int, int], to_grid: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Shares of the visible patches in the cells of another grid of the same clip.

    Args:
        mask: bool (B, patches), True = dropped.
        from_grid: (T, H, W) of the patches.
        to_grid: (T', H', W') of the cells.

    Returns:
        (B, cells, visible patches): rows sum to 1, or to 0 where nothing is visible; and (B, cells)
        1 where a cell overlaps a visible patch, else 0.
    """
    shares = torch.ones(1, 1, device=mask.device)
    for size, cells in zip(from_grid, to_grid, strict=True):
        shares = torch.kron(shares, _overlap(size, cells).to(mask.device))
    shares = shares.T.expand(mask.shape[0], -1, -1)  # (B, patches, cells)
    shares = visible_tokens(shares, mask).transpose(1, 2)
    total = shares.sum(dim=2)
    return shares / torch.where(total > 0, total, 1.0)[..., None], (total > 0).float()


def _overlap(size: int, cells: int) -> Tensor:
    """(cells, size) lengths that equal intervals of [0, 1] cut two ways share, in whole numbers."""
    old = torch.arange(size) * cells
    new = torch.arange(cells)[:, None] * size
    return (torch.minimum(old + cells, new + size) - torch.maximum(old, new)).clamp(min=0).float()


def _table(*shape: int) -> Tensor:
    """A small random table; weights are meant to be loaded."""
    table = torch.empty(shape)
    nn.init.trunc_normal_(table, std=0.02)  # not returned: transformers switches `init` off
    return table
