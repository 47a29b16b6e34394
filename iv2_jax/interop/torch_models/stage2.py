"""Plain PyTorch modules that run exported stage-2 weights: towers, projections, matching heads.

Needs nothing but PyTorch. Parameter names are the original's (spec stage2 4 and 10), so a released
state dict loads strictly and an exported one loads into the original's classes. `video.py`,
`text.py` and `audio.py` must stand beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .audio import Beats
from .text import build as build_text
from .video import Student


class Features(NamedTuple):
    """What a batch of one kind of input gives.

    Attributes:
        tokens: what the fusion layers read (B, N, C); of text the hidden states (B, L, D).
        pooled: the tower's pooled vector.
        joint: (B, J) in the joint space, no unit length yet.
    """

    tokens: Tensor
    pooled: Tensor
    joint: Tensor


class Stage2Output(NamedTuple):
    """What `Stage2.forward` returns.

    Attributes:
        vision: features of the videos.
        text: features of the texts.
        audio: features of the sounds, or None.
        audiovisual: (B, J) joint vectors of sound and video, or None.
        match_logits: (B, 2) of each video with its text; class 1 = they belong together.
    """

    vision: Features
    text: Features
    audio: Features | None
    audiovisual: Tensor | None
    match_logits: Tensor


class Stage2(nn.Module):
    """Video, text and audio towers with what joins them.

    Args:
        config: the exported config: `vision` (a student's), `text` (BERT's), `audio` (BEATs' or
            None), joint_width, project_tokens, av_fusion, audio_matching, av_matching, temp_init.
        fused_attention: use `scaled_dot_product_attention` in the video tower.
    """

    def __init__(self, config: Mapping[str, Any], *, fused_attention: bool = True) -> None:
        super().__init__()
        vision, text, joint = config["vision"], config["text"], config["joint_width"]
        width, tokens = text["width"], text["context_width"]
        self.temp = nn.Parameter(torch.tensor(float(config["temp_init"])))
        bias = config.get("contrast_bias_init")
        if bias is not None:  # of the sigmoid loss, which the original has not
            self.contrast_bias = nn.Parameter(torch.tensor(float(bias)))
        self.vision_encoder = Student(vision, fused_attention=fused_attention)
        self.text_encoder = build_text(text)
        self.vision_proj = nn.Linear(vision["encoder"]["pool_width"], joint)
        self.text_proj = nn.Linear(width, joint)
        self.itm_head = nn.Linear(width, 2)
        if config["project_tokens"]:
            self.av_concat_vision_proj = _token_projection(vision["encoder"]["width"], tokens)
        if config["audio"]:
            self.audio_encoder = Beats(config["audio"])
            self.audio_proj = nn.Linear(config["audio"]["width"], joint)
            self.av_concat_audio_proj = _token_projection(config["audio"]["width"], tokens)
        if config["av_fusion"]:
            self.av_fusion = nn.Linear(2 * joint, joint)
        if config["audio_matching"]:
            self.atm_head = nn.Linear(width, 2)
        if config["av_matching"]:
            self.avtm_head = nn.Linear(width, 2)

    def forward(
        self,
        video: Tensor,
        ids: Tensor,
        mask: Tensor | None = None,
        fbank: Tensor | None = None,
    ) -> Stage2Output:
        """Encodes videos with their texts and sounds, and judges the pairs.

        Args:
            video: (B, 3, T, H, W) normalised pixels; T = 1 for images.
            ids: (B, L) token ids.
            mask: (B, L), 1 = token, 0 = padding; None for no padding.
            fbank: (B, frames, mels) normalised log-mel energies, or None.
        """
        vision, text = self.encode_vision(video), self.encode_text(ids, mask)
        audio = audiovisual = None
        if fbank is not None:
            audio = self.encode_audio(fbank)
            if hasattr(self, "av_fusion"):
                audiovisual = self.av_fusion(torch.cat([audio.joint, vision.joint], dim=-1))
        logits = self.match_logits(self.fuse(vision.tokens, text.tokens, mask))
        return Stage2Output(vision, text, audio, audiovisual, logits)

    def encode_vision(self, video: Tensor, mask: Tensor | None = None) -> Features:
        """Encodes (B, 3, T, H, W); `mask` is bool (B, tokens), True = dropped, or None."""
        out = self.vision_encoder.encode(video, mask)
        tokens = out.tokens
        if hasattr(self, "av_concat_vision_proj"):
            tokens = self.av_concat_vision_proj(tokens)
        return Features(tokens, out.pooled, self.vision_proj(out.pooled))

    def encode_audio(self, fbank: Tensor) -> Features:
        """Encodes (B, frames, mels); the pooled vector is the mean of the tokens."""
        tokens = self.audio_encoder(fbank)
        pooled = tokens.mean(dim=1)
        return Features(self.av_concat_audio_proj(tokens), pooled, self.audio_proj(pooled))

    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Features:
        """Encodes (B, L) token ids; the pooled vector is the first token's."""
        hidden = self.text_encoder.encode_text(ids, mask)
        return Features(hidden, hidden[:, 0], self.text_proj(hidden[:, 0]))

    def fuse(self, tokens: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Lets texts (B, L, D) read media (B, N, C): (B, L, D). Audio tokens before vision's."""
        return self.text_encoder.fuse(hidden, mask, tokens)

    def match_logits(self, fused: Tensor, media: str = "video") -> Tensor:
        """(B, 2) of what `fuse` gave; `media` is "video", "audio" or "audiovisual"."""
        heads = {"video": "itm_head", "audio": "atm_head", "audiovisual": "avtm_head"}
        return getattr(self, heads[media])(fused[:, 0])

    def word_logits(self, fused: Tensor) -> Tensor:
        """(B, L, V) of what `fuse` gave for corrupted texts."""
        return self.text_encoder.mlm_logits(fused)


def _token_projection(in_width: int, out_width: int) -> nn.Sequential:
    """Linear map and LayerNorm of a tower's tokens."""
    return nn.Sequential(nn.Linear(in_width, out_width), nn.LayerNorm(out_width))


def from_config(config: Mapping[str, Any], *, fused_attention: bool = True) -> Stage2:
    """Builds the model that an exported `config.json` describes, ready for `load_state_dict`.

    Args:
        config: the file's contents; `config["kind"]` is "stage2".
        fused_attention: as in `Stage2`.

    Raises:
        ValueError: `kind` is another.
    """
    if config.get("kind") != "stage2":
        raise ValueError(f"config kind must be 'stage2', not {config.get('kind')!r}")
    return Stage2(config["model"], fused_attention=fused_attention).eval()
