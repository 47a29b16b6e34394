"""One alignment step of ours against the same step in plain PyTorch, on the CPU.

    python benchmarks/stage2_step.py --json runs/stage2_step.json

Both sides take the same step of video-text alignment: an S-sized video tower (width 384, depth 12)
that sees 205 of 1024 patches of 4 frames of 224 px, a BERT of MiniLM's size (width 384, 6 text and
3 fusion layers, 30522 words, 32 tokens), contrast + matching with two negatives a pair + masked
words, backward, clipping, AdamW, float32, the same weights, threads, negatives and hidden words.
PyTorch's side is `interop/torch_models/stage2.py`, put together as the released code does it: one
pass for captions and one for their corrupted copies, one of 3 B pairs through the fusion layers
and one for words, logits at every place. Ours is the training stage's own `BatchTerms`.

Variants take turns in one run, see `side_by_side.py`. Takes about 4 minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import side_by_side
import torch_side
from side_by_side import Variant

LEARNING_RATE, BETAS, EPSILON, DECAY, CLIP = 5e-5, (0.9, 0.98), 1e-8, 0.05, 3.0
CLS, MASK = 101, 103


def model_config(args: argparse.Namespace) -> Any:
    """The model of the protocol; without dropout, which the sides could not share."""
    from iv2_jax.models.stage2 import Stage2Config
    from iv2_jax.models.student import StudentConfig
    from iv2_jax.models.text.bert import BertConfig
    from iv2_jax.models.video_encoder import EncoderConfig

    encoder = EncoderConfig(
        width=args.width,
        depth=args.depth,
        num_heads=args.width // 64,
        mlp_width=4 * args.width,
        num_frames=args.frames,
        tanh_gelu=False,
    )
    text = BertConfig(
        width=384,
        depth=9,
        fusion_layer=6,
        num_heads=12,
        mlp_width=1536,
        context_width=args.width,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
    )
    vision = StudentConfig(encoder, clip=None, mae=None, final_width=0, final_decoder="linear")
    return Stage2Config(vision=vision, text=text)


def make_inputs(config: Any, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """A fixed batch with its draws: captions of 8 to 20 words, half of them hidden."""
    rng = np.random.default_rng(0)
    encoder, rows, length = config.vision.encoder, args.batch, args.words
    patches = encoder.num_tokens - 1
    shown = patches - int(patches * 0.8)
    ids = np.zeros((rows, length), np.int32)
    for row in ids:
        count = rng.integers(8, min(20, length - 1))
        row[: 1 + count] = [CLS, *rng.integers(1000, config.text.vocab_size, count)]
    chosen = (ids > CLS) & (rng.random(ids.shape) < 0.5)
    size = encoder.image_size
    return {
        "video": rng.integers(0, 256, (rows, args.frames, size, size, 3)).astype(np.uint8),
        "visible": np.stack(
            [
                np.concatenate([[0], 1 + np.sort(rng.permutation(patches)[:shown])])
                for _ in range(rows)
            ]
        ).astype(np.int32),
        "text_video": ids,
        "match_id": np.arange(rows, dtype=np.int32),
        "corrupted": np.where(chosen, MASK, ids),
        "labels": np.where(chosen, ids, -100),
        "wrong": ((np.arange(rows) + 1) % rows).astype(np.int32),
    }


def jax_step(config: Any, params: Any, inputs: dict[str, np.ndarray]) -> Callable[[], float]:
    """Our step: jitted, state donated, with the stage's own loss."""
    import jax
    import jax.numpy as jnp
    import optax

    from iv2_jax.models.stage2 import Stage2
    from iv2_jax.objectives.matching import Negatives
    from iv2_jax.train.align_config import AlignLossConfig, Towers
    from iv2_jax.train.align_terms import BatchTerms, Draws

    class Given(Draws):
        def __init__(self, batch: Any) -> None:
            self.batch = batch

        def hidden_words(self, term: str, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.batch["corrupted"], self.batch["labels"]

        def negatives(self, *args: Any) -> Negatives:
            return Negatives(self.batch["wrong"], jnp.ones(len(self.batch["wrong"]), bool))

    loss_config = AlignLossConfig()
    names = loss_config.terms("video")
    model = Stage2(config)
    tx = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(LEARNING_RATE, *BETAS, eps=EPSILON, weight_decay=DECAY),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, moments = state

        def terms(bound: Stage2) -> dict[str, jax.Array]:
            towers = {"visible": batch["visible"], "teacher": None, "train": Towers(*[True] * 4)}
            return BatchTerms(bound, loss_config, batch, names, Given(batch), **towers).compute()

        def loss_fn(params: Any) -> jax.Array:
            return sum(model.apply({"params": params}, method=terms).values())

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, moments = tx.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    params = jax.tree.map(jnp.array, params)
    state, batch = (params, tx.init(params)), jax.device_put(inputs)

    def take() -> float:
        nonlocal state
        state, loss = step(state, batch)
        jax.block_until_ready(state)
        return float(loss)

    return take


def torch_step(
    config: Any, params: Any, inputs: dict[str, np.ndarray], *, fused: bool, compiled: bool
) -> Callable[[], float]:
    """The same step in plain PyTorch; `compiled` compiles the loss function."""
    import torch
    from torch.nn import functional as F

    from iv2_jax import config as config_lib
    from iv2_jax.interop.torch_keys.stage2 import stage2_map
    from iv2_jax.interop.torch_models import stage2

    contents = {"kind": "stage2", "model": config_lib.to_dict(config)}
    model = stage2.from_config(contents, fused_attention=fused).train()
    torch_side.load(model, stage2_map(config), params, strict=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY
    )
    encoder = config.vision.encoder
    mean, std = (
        torch.tensor(x)[:, None, None, None] for x in (encoder.pixel_mean, encoder.pixel_std)
    )
    video = torch_side.clips(inputs["video"])
    dropped = torch_side.hidden(inputs["visible"], encoder.num_tokens)
    ids, corrupted, labels, wrong = (
        torch.from_numpy(inputs[n].astype(np.int64))
        for n in ("text_video", "corrupted", "labels", "wrong")
    )
    mask, rows = (ids != 0).long(), len(ids)
    judged = torch.tensor([1] * rows + [0] * (2 * rows))

    def loss_fn() -> Any:
        vision = model.encode_vision((video.float() / 255 - mean) / std, dropped)
        text = model.encode_text(ids, mask)
        a, b = (F.normalize(x, dim=-1) for x in (vision.joint, text.joint))
        scores = a @ b.T / model.temp
        pairs = torch.arange(rows)
        contrast = (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2
        fused = model.fuse(
            torch.cat([vision.tokens, vision.tokens[wrong], vision.tokens]),
            torch.cat([text.tokens, text.tokens, text.tokens[wrong]]),
            torch.cat([mask, mask, mask[wrong]]),
        )
        matching = F.cross_entropy(model.match_logits(fused), judged)
        read = model.fuse(vision.tokens, model.encode_text(corrupted, mask).tokens, mask)
        words = F.cross_entropy(model.word_logits(read).flatten(0, 1), labels.flatten())
        return contrast + matching + words

    forward = torch.compile(loss_fn) if compiled else loss_fn

    def take() -> float:
        loss = forward()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(loss.detach())

    return take


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    side_by_side.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--words", type=int, default=32, help="tokens of a caption")
    parser.add_argument("--width", type=int, default=384, help="of the video tower")
    parser.add_argument("--depth", type=int, default=12, help="of the video tower")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--unroll", action="store_true", help="our loops over layers, unrolled")
    args = parser.parse_args()
    side_by_side.set_up(args)

    from iv2_jax.models import kinds

    config = model_config(args)
    inputs = make_inputs(config, args)
    abstract = kinds.of(config).abstract_params(config)
    params = torch_side.random_params(abstract, {"temp": 0.07})
    ours = config
    if args.unroll:
        encoder = dataclasses.replace(config.vision.encoder, scan_unroll=args.depth)
        ours = dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, encoder=encoder),
            text=dataclasses.replace(config.text, scan_unroll=config.text.depth),
        )
    variants = [Variant(f"ours{', unrolled' * args.unroll}", jax_step(ours, params, inputs))]
    variants += torch_side.variants(args, functools.partial(torch_step, config, params, inputs))
    side_by_side.compare(variants, args, {"tokens": inputs["visible"].shape[1]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
