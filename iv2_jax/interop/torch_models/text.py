"""Plain PyTorch modules that run exported BERT weights: text tower, fusion layers, masked-LM head.

Needs nothing but PyTorch. Parameter names are the original's (spec stage2 3 and 10), so a released
state dict loads strictly and an exported one loads into the original's classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embeddings(nn.Module):
    """LayerNorm(word + position + first token type)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, length = config["width"], config["max_length"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], width)
        self.position_embeddings = nn.Embedding(length, width)
        self.token_type_embeddings = nn.Embedding(config["token_types"], width)
        self.LayerNorm = nn.LayerNorm(width, eps=config["epsilon"])
        self.dropout = nn.Dropout(config["dropout_rate"])
        self.register_buffer("position_ids", torch.arange(length)[None])

    def forward(self, ids: Tensor) -> Tensor:
        """Embeds ids (B, L) into (B, L, D)."""
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        x = x + self.position_embeddings(self.position_ids[:, : ids.shape[1]])
        return self.dropout(self.LayerNorm(x))


class Output(nn.Module):
    """LayerNorm(x + dropout(linear(branch))): how every sub-layer ends."""

    def __init__(self, inputs: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config["width"])
        self.LayerNorm = nn.LayerNorm(config["width"], eps=config["epsilon"])
        self.dropout = nn.Dropout(config["dropout_rate"])

    def forward(self, branch: Tensor, x: Tensor) -> Tensor:
        """Closes a branch onto its input."""
        return self.LayerNorm(x + self.dropout(self.dense(branch)))


class MultiHead(nn.Module):
    """Attention of tokens to a source of keys and values, with additive scores."""

    def __init__(self, config: Mapping[str, Any], source_width: int) -> None:
        super().__init__()
        width = config["width"]
        self.num_heads = config["num_heads"]
        self.dropout_rate = config["attention_dropout_rate"]
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
        """Mixes source (B, M, C) for the tokens (B, N, D)."""
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(source), self.value(source))
        )
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = (scores if bias is None else scores + bias).softmax(dim=-1)
        weights = F.dropout(weights, self.dropout_rate, self.training)
        return (weights @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Post-norm attention sub-layer; `self` is the original's name of the inner module."""

    def __init__(self, config: Mapping[str, Any], source_width: int) -> None:
        super().__init__()
        self.self = MultiHead(config, source_width)
        self.output = Output(config["width"], config)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
        """Maps (B, N, D) to (B, N, D)."""
        return self.output(self.self(x, source, bias), x)


class Intermediate(nn.Module):
    """Linear and exact GELU."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.dense = nn.Linear(config["width"], config["mlp_width"])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., M)."""
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Self-attention, optional cross-attention, feed-forward."""

    def __init__(self, config: Mapping[str, Any], *, cross_attention: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config["width"])
        if cross_attention:
            self.crossattention = Attention(config, config["context_width"])
        self.cross_attention = cross_attention
        self.intermediate = Intermediate(config)
        self.output = Output(config["mlp_width"], config)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        context: Tensor | None = None,
        context_bias: Tensor | None = None,
    ) -> Tensor:
        """Maps (B, N, D) to (B, N, D)."""
        x = self.attention(x, x, bias)
        if self.cross_attention:
            x = self.crossattention(x, context, context_bias)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    """All layers; those from `fusion_layer` on have cross-attention."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fusion = config["fusion_layer"]
        self.layer = nn.ModuleList(
            Layer(config, cross_attention=index >= fusion) for index in range(config["depth"])
        )


class BertModel(nn.Module):
    """BERT without a head, as the original has it for retrieval and question answering.

    Args:
        config: the exported config: context_width, width, depth, fusion_layer, num_heads,
            mlp_width, vocab_size, max_length, token_types, epsilon and both dropout rates.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.fusion_layer = config["fusion_layer"]
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Runs embeddings and text layers (mode "text").

        Args:
            ids: (B, L) token ids.
            mask: (B, L), 1 = token, 0 = padding; None for no padding.

        Returns:
            (B, L, D); the first token is the pooled text feature.
        """
        hidden, bias = self.embeddings(ids), _bias(mask, -10000.0)
        for layer in self.encoder.layer[: self.fusion_layer]:
            hidden = layer(hidden, bias)
        return hidden

    def fuse(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        context: Tensor,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Runs the fusion layers on what `encode_text` gave (mode "fusion").

        Args:
            hidden: (B, L, D).
            mask: (B, L) mask of the text.
            context: (B, M, C) video or audio tokens.
            context_mask: (B, M), 1 = token; None for all.
        """
        bias = _bias(mask, -10000.0)
        context_bias = _bias(context_mask, torch.finfo(torch.float32).min)
        for layer in self.encoder.layer[self.fusion_layer :]:
            hidden = layer(hidden, bias, context, context_bias)
        return hidden

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Runs all layers (mode "multi_modal"): (B, L, D)."""
        return self.fuse(self.encode_text(ids, mask), mask, context, context_mask)


class HeadTransform(nn.Module):
    """Linear, exact GELU, LayerNorm."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.dense = nn.Linear(config["width"], config["width"])
        self.LayerNorm = nn.LayerNorm(config["width"], eps=config["epsilon"])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., D)."""
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """Scores of all words; the decoder is the word table, its bias stands here as well."""

    def __init__(self, config: Mapping[str, Any], word_table: nn.Parameter) -> None:
        super().__init__()
        self.transform = HeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config["vocab_size"]))
        self.decoder = nn.Linear(config["width"], config["vocab_size"])
        self.decoder.weight = word_table
        self.decoder.bias = self.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps (..., D) to (..., V)."""
        return self.decoder(self.transform(hidden))


class Bert(nn.Module):
    """BERT with its masked-LM head: the original's class in pretraining.

    Args:
        config: as in `BertModel`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.bert = BertModel(config)
        table = self.bert.embeddings.word_embeddings.weight
        self.cls = nn.ModuleDict({"predictions": Predictions(config, table)})

    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """As in `BertModel`."""
        return self.bert.encode_text(ids, mask)

    def fuse(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        context: Tensor,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """As in `BertModel`."""
        return self.bert.fuse(hidden, mask, context, context_mask)

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., V) of the words at each place of hidden states (..., D)."""
        return self.cls["predictions"](hidden)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """As in `BertModel`: hidden states, not logits."""
        return self.bert(ids, mask, context, context_mask)


def from_config(config: Mapping[str, Any]) -> BertModel | Bert:
    """Builds the model that an exported `config.json` describes, ready for `load_state_dict`.

    Args:
        config: the file's contents; `config["kind"]` is "bert". `config["model"]["mlm_head"]`
            chooses between `Bert` and `BertModel`.

    Raises:
        ValueError: `kind` is another.
    """
    if config.get("kind") != "bert":
        raise ValueError(f"config kind must be 'bert', not {config.get('kind')!r}")
    return build(config["model"]).eval()


def build(config: Mapping[str, Any]) -> BertModel | Bert:
    """Builds a text tower of a model config, with or without its head."""
    return (Bert if config["mlm_head"] else BertModel)(config)


def _bias(mask: Tensor | None, score: float) -> Tensor | None:
    """Additive scores (B, 1, 1, M) of a mask (B, M), 1 = token."""
    return None if mask is None else (1.0 - mask.float())[:, None, None] * score
