"""Plain PyTorch language models of Mistral, LLaMA and InternLM2 type, with or without adapters.

Needs nothing but PyTorch. Parameter names are the originals' (transformers' Mistral and LLaMA, or
InternLM2's; adapters as peft up to 0.5 names them), so released state dicts load strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]  # keys and values (B, kv_heads, N, head_dim) of every layer


class LlmOutput(NamedTuple):
    """What `CausalLm.forward` returns.

    Attributes:
        logits: (B, N, vocab_size) float32.
        hidden: (B, N, width) after the final norm.
        cache: keys and values of all tokens so far.
    """

    logits: Tensor
    hidden: Tensor
    cache: Cache


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the statistics are float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


class AdaptedLinear(nn.Linear):
    """A linear map without bias and the low-rank adapter beside it."""

    def __init__(self, inputs: int, outputs: int, lora: Mapping[str, Any]) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, lora["rank"], bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(lora["rank"], outputs, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.dropout = nn.Dropout(lora["dropout"])
        self.scale = lora["alpha"] / lora["rank"]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., inputs) to (..., outputs)."""
        down, up = self.lora_A["default"], self.lora_B["default"]
        adapted = up(down(self.dropout(x.to(down.weight.dtype)))) * self.scale
        return (super().forward(x) + adapted).to(x.dtype)


def linear(config: Mapping[str, Any], name: str, inputs: int, outputs: int) -> nn.Linear:
    """A map of a block, with an adapter if `config` gives it one."""
    if config["lora"] and name in config["lora_targets"]:
        return AdaptedLinear(inputs, outputs, config["lora"])
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the maps are made by the subclasses."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.groups = config["num_heads"], config["num_kv_heads"]
        self.head_dim = config["head_dim"]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, heads, d), keys and values (B, N, groups, d)."""
        raise TypeError("made by a subclass")

    def out(self, x: Tensor) -> Tensor:
        """Maps the heads (B, N, heads * d) back to (B, N, width)."""
        raise TypeError("made by a subclass")

    def forward(
        self, x: Tensor, angles: Tensor, hidden: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attends; `hidden` is bool (B, 1, N, M), True = not seen. Returns keys and values too."""
        q, k, v = (part.transpose(1, 2) for part in self.project(x))
        q, k = rotate(q, angles), rotate(k, angles)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        share = self.heads // self.groups
        scores = q @ k.repeat_interleave(share, dim=1).transpose(-2, -1) * self.head_dim**-0.5
        scores = scores.float().masked_fill(hidden, torch.finfo(torch.float32).min)
        weights = scores.softmax(dim=-1).to(v.dtype)
        mixed = weights @ v.repeat_interleave(share, dim=1)
        return self.out(mixed.transpose(1, 2).flatten(2)), (k, v)


class SplitAttention(Attention):
    """Three maps make queries, keys and values: Mistral and LLaMA."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        width, inner = config["width"], self.heads * self.head_dim
        self.q_proj = linear(config, "q", width, inner)
        self.k_proj = linear(config, "k", width, self.groups * self.head_dim)
        self.v_proj = linear(config, "v", width, self.groups * self.head_dim)
        self.o_proj = linear(config, "o", inner, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, heads, d), keys and values (B, N, groups, d)."""
        maps = (self.q_proj, self.k_proj, self.v_proj)
        return tuple(layer(x).unflatten(-1, (-1, self.head_dim)) for layer in maps)

    def out(self, x: Tensor) -> Tensor:
        """Maps the heads (B, N, heads * d) back to (B, N, width)."""
        return self.o_proj(x)


class FusedAttention(Attention):
    """One map makes all three, by group of heads: InternLM2."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        width, inner = config["width"], self.heads * self.head_dim
        self.wqkv = linear(config, "qkv", width, inner + 2 * self.groups * self.head_dim)
        self.wo = linear(config, "o", inner, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, heads, d), keys and values (B, N, groups, d)."""
        x = self.wqkv(x).unflatten(-1, (self.groups, -1, self.head_dim))
        return x[..., :-2, :].flatten(2, 3), x[..., -2, :], x[..., -1, :]

    def out(self, x: Tensor) -> Tensor:
        """Maps the heads (B, N, heads * d) back to (B, N, width)."""
        return self.wo(x)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), under the names of either family."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        fused = config["fused_qkv"]
        self.names = ("w1", "w3", "w2") if fused else ("gate_proj", "up_proj", "down_proj")
        width, hidden = config["width"], config["mlp_width"]
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        for name, (ours, shape) in zip(self.names, shapes.items(), strict=True):
            self.add_module(name, linear(config, ours, *shape))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., width) to (..., width)."""
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(F.silu(gate(x)) * up(x))


class Block(nn.Module):
    """Pre-norm block under the names of either family."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, epsilon = config["width"], config["norm_epsilon"]
        if config["fused_qkv"]:
            self.names = ("attention_norm", "attention", "ffn_norm", "feed_forward")
            attention = FusedAttention(config)
        else:
            self.names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
            attention = SplitAttention(config)
        parts = (RMSNorm(width, epsilon), attention, RMSNorm(width, epsilon), GatedMlp(config))
        for name, part in zip(self.names, parts, strict=True):
            self.add_module(name, part)

    def forward(
        self, x: Tensor, angles: Tensor, hidden: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Maps (B, N, width) to (B, N, width); returns keys and values too."""
        norm1, attention, norm2, mlp = (getattr(self, name) for name in self.names)
        mixed, past = attention(norm1(x), angles, hidden, past)
        x = x + mixed
        return x + mlp(norm2(x)), past


class Decoder(nn.Module):
    """Token embedding, blocks and final norm.

    Args:
        config: the exported config's `decoder`.
        vocab_size: rows of the embedding; 0 for none.
    """

    def __init__(self, config: Mapping[str, Any], vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding_name = "tok_embeddings" if config["fused_qkv"] else "embed_tokens"
        if vocab_size:
            self.add_module(self.embedding_name, nn.Embedding(vocab_size, config["width"]))
        self.layers = nn.ModuleList(Block(config) for _ in range(config["depth"]))
        self.norm = RMSNorm(config["width"], config["norm_epsilon"])

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeds (B, N) as (B, N, width)."""
        return getattr(self, self.embedding_name)(tokens)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Cache]:
        """Runs the blocks; causal.

        Args:
            x: (B, N, width) embeddings.
            mask: bool (B, M) over the cached and the new tokens, False = padding.
            positions: (B, N) rotary positions; None counts real tokens.
            cache: what the call before returned.

        Returns:
            (B, N, width) after the final norm, and the longer cache.
        """
        length = x.shape[1]
        total = length + (cache[0][0].shape[2] if cache else 0)
        if mask is None:
            mask = torch.ones(x.shape[0], total, dtype=torch.bool, device=x.device)
        mask = mask.bool()
        counted = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        if positions is None:
            positions = counted[:, -length:]
        index = torch.arange(total, device=x.device)
        distance = index[-length:, None] - index[None]
        seen = (distance >= 0) & mask[:, None]
        if self.config["sliding_window"] is not None:
            # Padding may stand between cached tokens and new ones: real tokens are counted.
            seen = seen & (
                counted[:, -length:, None] - counted[:, None] < self.config["sliding_window"]
            )
        angles = rotary_angles(positions, self.config["head_dim"], self.config["rope"])
        new: Cache = []
        for layer, past in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            x, keys_values = layer(x, angles, ~seen[:, None], past)
            new.append(keys_values)
        return self.norm(x), new


class CausalLm(nn.Module):
    """Decoder and head.

    Args:
        config: the exported config's `model`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        decoder = config["decoder"]
        self.model = Decoder(decoder, config["vocab_size"])
        self.head_name = "output" if decoder["fused_qkv"] else "lm_head"
        targets = ("head",) if config["lora_head"] else ()
        head = linear(
            {"lora": decoder["lora"], "lora_targets": targets},
            "head",
            decoder["width"],
            config["vocab_size"],
        )
        if config["tied_head"]:
            head.weight = getattr(self.model, self.model.embedding_name).weight
        self.add_module(self.head_name, head)

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> LlmOutput:
        """Scores the next token of every position; arguments as in `Decoder.forward`."""
        x = self.model.embed(tokens) if embeddings is None else embeddings
        hidden, cache = self.model(x, mask, positions, cache)
        logits = getattr(self, self.head_name)(hidden)
        return LlmOutput(logits.float(), hidden, cache)

    @torch.no_grad()
    def greedy(
        self, embeddings: Tensor, count: int, *, mask: Tensor | None = None, eos_id: int = -1
    ) -> Tensor:
        """Continues prompts given as embeddings (B, N, width), padded left if `mask` says so.

        Returns:
            (B, count) tokens; behind `eos_id` a row repeats it.
        """
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        out = self(embeddings=embeddings, mask=mask)
        tokens: list[Tensor] = []
        for step in range(count):
            token = out.logits[:, -1].argmax(dim=-1)
            if tokens:
                token = torch.where(tokens[-1] == eos_id, tokens[-1], token)
            tokens.append(token)
            if step + 1 < count:
                mask = F.pad(mask, (0, 1), value=True)
                out = self(token[:, None], mask=mask, cache=out.cache)
        return torch.stack(tokens, dim=1)


class AdaptedLm(nn.Module):
    """A `CausalLm` under the prefix that peft puts before its keys."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = CausalLm(config)

    @property
    def causal_lm(self) -> CausalLm:
        """The model inside."""
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> LlmOutput:
        """Calls the model inside."""
        return self.base_model.model(*args, **kwargs)


def build(config: Mapping[str, Any]) -> CausalLm | AdaptedLm:
    """Builds the language model of a config, with peft's prefix where it has adapters."""
    return AdaptedLm(config) if config["decoder"]["lora"] else CausalLm(config)


def embed(model: CausalLm | AdaptedLm, tokens: Tensor) -> Tensor:
    """Embeds tokens (B, N) as (B, N, width), whatever `build` gave."""
    inner = model.causal_lm if isinstance(model, AdaptedLm) else model
    return inner.model.embed(tokens)


def logits(model: CausalLm | AdaptedLm, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits (B, N, vocab_size) of embeddings (B, N, width); `mask` is False at padding."""
    return model(embeddings=embeddings, mask=mask).logits


def from_config(config: Mapping[str, Any]) -> CausalLm | AdaptedLm:
    """Builds the model that an exported `config.json` describes, ready for `load_state_dict`.

    Args:
        config: the file's contents; `config["kind"]` is "llm".

    Raises:
        ValueError: `kind` is another.
    """
    if config.get("kind") != "llm":
        raise ValueError(f"config kind must be 'llm', not {config.get('kind')!r}")
    return build(config["model"]).eval()


def rotary_angles(positions: Tensor, head_dim: int, rope: Mapping[str, Any]) -> Tensor:
    """Angles (B, 1, N, head_dim / 2) of positions (B, N), float32 (spec stage 3, 6.2)."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    theta = torch.full((positions.shape[0], 1), float(rope["theta"]), device=positions.device)
    places = positions.float()
    if rope["scaling"] == "linear":
        places = places / rope["factor"]
    elif rope["scaling"] == "dynamic":
        length = places.max(dim=1, keepdim=True).values + 1
        growth = rope["factor"] * length / rope["base_length"] - (rope["factor"] - 1)
        theta = theta * growth.clamp(min=1.0) ** (head_dim / (head_dim - 2))
    frequencies = 1.0 / theta**exponents
    if rope.get("divisors"):
        frequencies = frequencies / torch.tensor(rope["divisors"], device=positions.device)
    return (places[:, :, None] * frequencies[:, None])[:, None]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns the pairs (i, i + d/2) of (B, heads, N, d); float32 inside."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
