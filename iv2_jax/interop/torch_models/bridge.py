"""Plain PyTorch modules that run exported weights of the bridge, the Q-Former with its projection.

Needs nothing but PyTorch and the files beside it. Parameter names are the original's (spec stage3
9), so a released state dict loads strictly and an exported one loads into the original's classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .text import Attention, Intermediate, Output
from .video import DropPath


class BridgeOutput(NamedTuple):
    """What `Bridge` returns.

    Attributes:
        tokens: (B, K, llm_width) visual tokens.
        hidden: (B, K + L, D) outputs of the Q-Former, those of the text after the queries'.
    """

    tokens: Tensor
    hidden: Tensor


class Closing(Output):
    """LayerNorm(x + drop path(dropout(linear(branch))))."""

    def __init__(self, inputs: int, config: Mapping[str, Any], drop_path: float) -> None:
        super().__init__(inputs, config)
        self.drop_path = DropPath(drop_path)

    def forward(self, branch: Tensor, x: Tensor) -> Tensor:
        """Closes a branch onto its input."""
        return self.LayerNorm(x + self.drop_path(self.dropout(self.dense(branch))))


class QFormerLayer(nn.Module):
    """Self-attention of queries and text, cross-attention of queries, a feed-forward for each."""

    def __init__(
        self, config: Mapping[str, Any], *, cross_attention: bool, drop_path: float
    ) -> None:
        super().__init__()
        width, hidden = config["width"], config["mlp_width"]
        self.num_queries = num_tokens(config)
        self.cross_attention, self.text = cross_attention, config["text"]
        self.attention = Attention(config, width)
        self.attention.output = Closing(width, config, drop_path)
        if cross_attention:
            self.crossattention = Attention(config, config["context_width"])
            self.crossattention.output = Closing(width, config, drop_path)
        if self.text:
            self.intermediate = Intermediate(config)
            self.output = Closing(hidden, config, drop_path)
        self.intermediate_query = Intermediate(config)
        self.output_query = Closing(hidden, config, drop_path)

    def forward(
        self, x: Tensor, bias: Tensor | None, context: Tensor, context_bias: Tensor | None
    ) -> Tensor:
        """Maps (B, K + L, D) to the same, with the video's tokens (B, M, C) as context."""
        x = self.attention(x, x, bias)
        queries, text = x[:, : self.num_queries], x[:, self.num_queries :]
        if self.cross_attention:
            queries = self.crossattention(queries, context, context_bias)
        queries = self.output_query(self.intermediate_query(queries), queries)
        if not self.text or not text.shape[1]:
            return queries
        return torch.cat([queries, self.output(self.intermediate(text), text)], dim=1)


class QFormerEmbeddings(nn.Module):
    """LayerNorm over the queries and, behind them, word + position of the text."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, length = config["width"], config["max_length"]
        if config["text"]:
            self.word_embeddings = nn.Embedding(config["vocab_size"], width)
            self.position_embeddings = nn.Embedding(length, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config["epsilon"])
        self.dropout = nn.Dropout(config["dropout_rate"])
        self.register_buffer("position_ids", torch.arange(length)[None])

    def forward(self, queries: Tensor, ids: Tensor | None) -> Tensor:
        """Embeds ids (B, L) behind queries (B, K, D); positions of the text count from 0."""
        x = queries
        if ids is not None:
            words = self.word_embeddings(ids)
            words = words + self.position_embeddings(self.position_ids[:, : ids.shape[1]])
            x = torch.cat([queries, words], dim=1)
        return self.dropout(self.LayerNorm(x))


class QFormer(nn.Module):
    """Embeddings and layers; every `cross_every`-th layer, from the first on, reads the video."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embeddings = QFormerEmbeddings(config)
        rates = torch.linspace(0.0, config["drop_path_rate"], config["depth"]).tolist()
        layers = nn.ModuleList(
            QFormerLayer(config, cross_attention=i % config["cross_every"] == 0, drop_path=rate)
            for i, rate in enumerate(rates)
        )
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(
        self, queries: Tensor, ids: Tensor | None, bias: Tensor | None, *context: Tensor | None
    ) -> Tensor:
        """Runs all layers: (B, K + L, D)."""
        x = self.embeddings(queries, ids)
        for layer in self.encoder["layer"]:
            x = layer(x, bias, *context)
        return x


class BridgeMixin:
    """The bridge's parameters and its forward, for the bridge alone and within the chat model."""

    def add_bridge(self, config: Mapping[str, Any]) -> None:
        """Registers the parameters."""
        width = config["width"]
        self.bridge_text = config["text"]
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config["num_queries"], width))
        self.extra_query_tokens = None
        if config["num_extra_queries"]:
            extra = 0.02 * torch.randn(1, config["num_extra_queries"], width)
            self.extra_query_tokens = nn.Parameter(extra)
        self.vision_layernorm = nn.LayerNorm(config["context_width"], eps=config["epsilon"])
        self.qformer = nn.ModuleDict({"bert": QFormer(config)})
        self.projection = "project_up" if config["project_down"] else "mistral_proj"
        self.add_module(self.projection, nn.Linear(width, config["llm_width"]))
        if config["project_down"]:  # carried, never applied
            self.project_down = nn.Linear(config["llm_width"], width)

    def bridge(
        self,
        context: Tensor,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> BridgeOutput:
        """Turns the video's tokens into visual tokens of the language model.

        Args:
            context: (B, M, C) tokens of the video encoder, not normalised.
            ids: (B, L) text for the Q-Former; None for none.
            mask: (B, L), 1 = token, 0 = padding; None for no padding.
            context_mask: (B, M), 1 = token; None for all.

        Raises:
            ValueError: there is text for a bridge without.
        """
        if ids is not None and not self.bridge_text:
            raise ValueError("this bridge reads no text; give it no ids")
        parts = [self.query_tokens]
        if self.extra_query_tokens is not None:
            parts.append(self.extra_query_tokens)
        queries = torch.cat(parts, dim=1).expand(context.shape[0], -1, -1)
        bias = None
        if ids is not None and mask is not None:
            seen = torch.ones(queries.shape[:2], device=mask.device)
            bias = _bias(torch.cat([seen, mask.float()], dim=1), -10000.0)
        context_bias = _bias(context_mask, torch.finfo(torch.float32).min)
        normed = self.vision_layernorm(context)
        hidden = self.qformer["bert"](queries, ids, bias, normed, context_bias)
        tokens = getattr(self, self.projection)(hidden[:, : queries.shape[1]])
        return BridgeOutput(tokens, hidden)


class Bridge(BridgeMixin, nn.Module):
    """The bridge alone (spec stage3 2).

    Args:
        config: the exported bridge config.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.add_bridge(config)

    def forward(
        self,
        context: Tensor,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> BridgeOutput:
        """As in `bridge`."""
        return self.bridge(context, ids, mask, context_mask)


def from_config(config: Mapping[str, Any]) -> Bridge:
    """Builds the bridge that an exported `config.json` describes, ready for `load_state_dict`.

    Args:
        config: the file's contents; `config["kind"]` is "bridge".

    Raises:
        ValueError: `kind` is another.
    """
    if config.get("kind") != "bridge":
        raise ValueError(f"config kind must be 'bridge', not {config.get('kind')!r}")
    return Bridge(config["model"]).eval()


def num_tokens(config: Mapping[str, Any]) -> int:
    """Queries of a bridge: visual tokens of a view."""
    return config["num_queries"] + config["num_extra_queries"]


def _bias(mask: Tensor | None, score: float) -> Tensor | None:
    """Additive scores (B, 1, 1, M) of a mask (B, M), 1 = token."""
    return None if mask is None else (1.0 - mask.float())[:, None, None] * score
