"""Plain PyTorch modules that run exported weights of the dialogue model.

Needs nothing but PyTorch and the files beside it. Parameter names are the original's (spec stage3
9), so a released state dict loads strictly and an exported one loads into the original's classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import llm
from .bridge import BridgeMixin
from .video import Block, VideoEncoder


class ChatOutput(NamedTuple):
    """What `Chat` returns.

    Attributes:
        logits: (B, L, vocab_size); row i scores the token after i.
        embeddings: (B, L, llm_width) what entered the language model.
        visual: (B, V * K, llm_width) visual tokens, or None without media.
    """

    logits: Tensor
    embeddings: Tensor
    visual: Tensor | None


class BareBlock(Block):
    """The encoder's block with the released LayerScale, bare vectors `ls1` and `ls2`."""

    def __init__(self, config: Mapping[str, Any], drop_path: float, fused: bool) -> None:
        super().__init__(config, drop_path, fused)
        for name in ("ls1", "ls2"):
            gamma = getattr(self, name).gamma
            delattr(self, name)
            self.register_parameter(name, gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N, D) to (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x)) * self.ls1)
        return x + self.drop_path(self.mlp(self.norm2(x)) * self.ls2)


class ChatEncoder(VideoEncoder):
    """The video encoder with the chat release's parameter names."""

    block = BareBlock


class Chat(BridgeMixin, nn.Module):
    """Video encoder, bridge and language model (spec stage3 1).

    Args:
        config: the exported config: `encoder` (or None), `bridge`, `llm`, `bos_as_number`.
        fused_attention: use `scaled_dot_product_attention` in the encoder.
    """

    def __init__(self, config: Mapping[str, Any], *, fused_attention: bool = True) -> None:
        super().__init__()
        self.bos_as_number = config["bos_as_number"]
        self.vision_encoder = None
        if config["encoder"] is not None:
            self.vision_encoder = ChatEncoder(config["encoder"], fused_attention=fused_attention)
        self.add_bridge(config["bridge"])
        self.llm_name = "lm" if config["bridge"]["project_down"] else "mistral_model"
        self.add_module(self.llm_name, llm.build(config["llm"]))

    @property
    def language_model(self) -> nn.Module:
        """The language model, under its released name."""
        return getattr(self, self.llm_name)

    def forward(
        self,
        tokens: Tensor,
        visual_index: Tensor,
        mask: Tensor | None = None,
        video: Tensor | None = None,
        features: Tensor | None = None,
        bridge_ids: Tensor | None = None,
        bridge_mask: Tensor | None = None,
    ) -> ChatOutput:
        """Scores every token of a batch of dialogues.

        Args:
            tokens: (B, L) ids; any at the places of visual tokens.
            visual_index: (B, L), row of the sample's visual tokens that fills a place, views one
                after the other; -1 at text.
            mask: (B, L), False at padding; None for none.
            video: see `visual_tokens`; None, with `features` None too, for text alone.
            features: see `visual_tokens`.
            bridge_ids: see `visual_tokens`.
            bridge_mask: see `visual_tokens`.
        """
        visual = None
        if video is not None or features is not None:
            visual = self.visual_tokens(video, features, bridge_ids, bridge_mask)
        x = self.embed(tokens, visual_index, visual)
        return ChatOutput(llm.logits(self.language_model, x, mask), x, visual)

    def visual_tokens(
        self,
        video: Tensor | None = None,
        features: Tensor | None = None,
        bridge_ids: Tensor | None = None,
        bridge_mask: Tensor | None = None,
    ) -> Tensor:
        """Encodes the views of each sample, each on its own: (B, V * K, llm_width).

        Args:
            video: (B, V, 3, T, H, W) normalised pixels.
            features: (B, V, M, C) tokens of another video encoder, instead of `video`.
            bridge_ids: (B, L') text for the bridge, told to it with every view; None for none.
            bridge_mask: (B, L'), 1 = token, 0 = padding; None for no padding.
        """
        if features is None:
            flat = self.vision_encoder.encode(video.flatten(0, 1)).tokens
            features = flat.unflatten(0, video.shape[:2])
        views = features.shape[1]
        text = [
            None if part is None else part.repeat_interleave(views, dim=0)
            for part in (bridge_ids, bridge_mask)
        ]
        tokens = self.bridge(features.flatten(0, 1), *text).tokens
        return tokens.reshape(features.shape[0], -1, tokens.shape[-1])

    def embed(self, tokens: Tensor, visual_index: Tensor, visual: Tensor | None) -> Tensor:
        """Embeds tokens and puts visual tokens into their places: (B, L, llm_width)."""
        x = llm.embed(self.language_model, tokens)
        if visual is not None:
            index = visual_index.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1])
            x = torch.where((visual_index >= 0)[..., None], visual.gather(1, index), x)
        if self.bos_as_number:
            first = tokens[:, :1, None].to(x.dtype).expand(-1, -1, x.shape[-1])
            x = torch.cat([first, x[:, 1:]], dim=1)
        return x


def from_config(config: Mapping[str, Any], *, fused_attention: bool = True) -> Chat:
    """Builds the model that an exported `config.json` describes, ready for `load_state_dict`.

    Args:
        config: the file's contents; `config["kind"]` is "chat".
        fused_attention: as in `Chat`.

    Raises:
        ValueError: `kind` is another.
    """
    if config.get("kind") != "chat":
        raise ValueError(f"config kind must be 'chat', not {config.get('kind')!r}")
    return Chat(config["model"], fused_attention=fused_attention).eval()
