"""One stage-1 training step of ours against the same step in plain PyTorch, on the CPU.

    python benchmarks/stage1_step.py --json runs/stage1_step.json
    python benchmarks/stage1_step.py --forward --json runs/forward.json

Both sides take the same step: S-sized student (width 384, depth 12), 8 frames of 224 px, 417 of
2049 tokens, one decoder for each teacher, batch 2, targets precomputed and gathered, three-term
loss, backward, AdamW, float32, the same number of threads, the same weights at the start. The
PyTorch side is `interop/torch_models/video.py` with plain or fused attention, eager or compiled.

Variants take turns within every round, so that a change of the machine's speed hits all alike;
medians are compared. Compilation is outside the timing and given apart. The first losses must
agree, or nothing is reported. A last row does the step's matrix products and nothing else, with
torch's sgemm: the machine's own limit. On a busy machine take `--threads 1` and believe the CPU
times. `--forward` compares the encoder's forward pass over all 2049 tokens. Takes about 4 minutes
on two idle cores.
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

LEARNING_RATE, BETAS, EPSILON, DECAY = 1e-4, (0.9, 0.98), 1e-6, 0.05


def student_config(args: argparse.Namespace) -> Any:
    """The student of the protocol."""
    from iv2_jax.models.student import AlignmentConfig, StudentConfig
    from iv2_jax.models.video_encoder import EncoderConfig

    return StudentConfig(
        encoder=EncoderConfig(
            width=args.width,
            depth=args.depth,
            num_heads=args.width // 64,
            mlp_width=4 * args.width,
            image_size=args.image_size,
            num_frames=args.frames,
            tanh_gelu=args.gelu == "tanh",
        ),
        clip=AlignmentConfig(3200, (-1,), "linear", has_cls=True),
        mae=AlignmentConfig(1408, (-1,), "mlp", has_cls=False),
        final_width=768,
        final_decoder="linear",
    )


def make_inputs(config: Any, batch: int) -> dict[str, np.ndarray]:
    """A fixed batch: video, visible tokens (a fifth of each frame) and unit-length targets."""
    rng = np.random.default_rng(0)
    encoder = config.encoder
    frames, rows, columns = encoder.grid
    places = rows * columns
    shown = places - int(places * 0.8)
    visible = np.zeros((batch, 1 + frames * shown), np.int32)
    for clip in visible:
        picks = [np.sort(rng.permutation(places)[:shown]) + f * places for f in range(frames)]
        clip[1:] = 1 + np.concatenate(picks)

    def unit(*shape: int) -> np.ndarray:
        x = rng.normal(size=shape).astype(np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    tokens, size = visible.shape[1], encoder.image_size
    return {
        "video": rng.normal(size=(batch, encoder.num_frames, size, size, 3)).astype(np.float32),
        "visible": visible,
        "clip": unit(1, batch, tokens, config.clip.width),
        "final": unit(batch, config.final_width),
        "mae": unit(1, batch, tokens - 1, config.mae.width),
    }


def jax_step(config: Any, params: Any, inputs: dict[str, np.ndarray]) -> Callable[[], float]:
    """Our step: jitted, state donated."""
    import jax
    import optax

    from iv2_jax.models.student import Student
    from iv2_jax.objectives.distillation import alignment_loss, final_loss

    tx = optax.adamw(LEARNING_RATE, *BETAS, eps=EPSILON, weight_decay=DECAY)
    student = Student(config)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, moments = state

        def loss_fn(params: Any) -> jax.Array:
            out = student.apply({"params": params}, batch["video"], batch["visible"], train=True)
            loss = alignment_loss(out.clip, batch["clip"]) + alignment_loss(out.mae, batch["mae"])
            return loss + final_loss(out.final, batch["final"])

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, moments = tx.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    params = jax.tree.map(jax.numpy.array, params)
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
    """The same step in plain PyTorch; `compiled` compiles the model, as people do."""
    import torch

    from iv2_jax import config as config_lib
    from iv2_jax.interop import torch_keys
    from iv2_jax.interop.torch_models import video as torch_models

    contents = {"kind": "student", "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents, fused_attention=fused).train()
    torch_side.load(model, torch_keys.student_map(config), params)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY
    )
    video = torch_side.clips(inputs["video"])
    mask = torch_side.hidden(inputs["visible"], config.encoder.num_tokens)
    targets = {name: torch.from_numpy(inputs[name]) for name in ("clip", "final", "mae")}
    forward = torch.compile(model) if compiled else model

    def take() -> float:
        out = forward(video, mask)
        loss = sum(
            (2 - 2 * (getattr(out, name) * target).sum(-1)).mean()
            for name, target in targets.items()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return take


def jax_forward(config: Any, params: Any, inputs: dict[str, np.ndarray]) -> Callable[[], float]:
    """Our encoder's forward pass over all tokens."""
    import jax

    from iv2_jax.models.video_encoder import VideoEncoder

    encoder = VideoEncoder(config)
    forward = jax.jit(lambda params, video: encoder.apply({"params": params}, video).pooled)
    params, video = jax.device_put(params), jax.device_put(inputs["video"])
    return lambda: float(np.abs(forward(params, video)).mean())


def torch_forward(
    config: Any, params: Any, inputs: dict[str, np.ndarray], *, fused: bool, compiled: bool
) -> Callable[[], float]:
    """The same in plain PyTorch."""
    import torch

    from iv2_jax import config as config_lib
    from iv2_jax.interop import torch_keys
    from iv2_jax.interop.torch_models import video as torch_models

    contents = {"kind": "encoder", "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents, fused_attention=fused)
    torch_side.load(model, torch_keys.encoder_map(config), params)
    video = torch_side.clips(inputs["video"])
    forward = torch.compile(model) if compiled else model

    def take() -> float:
        with torch.no_grad():
            return float(forward(video).abs().mean())

    return take


def products(config: Any, batch: int, tokens: int, *, train: bool) -> list[tuple[int, ...]]:
    """`(count, *batch, M, K, N)` of the matrix products of a step, or of a forward pass.

    Those of the blocks, of the patch embedding and of the decoders; the pool's, of one query a
    clip but for keys and values, count as two maps of the width.
    """
    encoder = config.encoder if train else config
    width, depth, heads = encoder.width, encoder.depth, encoder.num_heads
    rows, hidden, head = batch * tokens, encoder.mlp_width, width // heads
    patch = encoder.tubelet * encoder.patch_size**2 * 3
    maps = [(depth, width, 3 * width), (depth, width, width), (2, width, width)]
    maps += [(depth, width, hidden), (depth, hidden, width)]
    if train:
        maps += [(1, width, config.clip.width)]
        maps += [(1, width, width), (1, width, config.mae.width)]
    shapes = [(count, rows, k, n) for count, k, n in maps] + [(1, rows - batch, patch, width)]
    if train:
        shapes += [(count, rows, n, k) for count, k, n in maps]
        shapes += [(count, k, rows, n) for count, k, n in maps] + [(1, patch, rows - batch, width)]
    # Scores and weighted values; backward one more of the first kind and three of the second.
    scores, values = (2 * depth, 4 * depth) if train else (depth, depth)
    by_head = batch * heads
    return [
        *shapes,
        (scores, by_head, tokens, head, tokens),
        (values, by_head, tokens, tokens, head),
    ]


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    side_by_side.add_arguments(parser)
    parser.add_argument(
        "--forward", action="store_true", help="the encoder's forward pass over all tokens instead"
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--gelu", choices=("erf", "tanh"), default="erf")
    parser.add_argument("--unroll", type=int, nargs="+", default=[1], help="blocks per scan turn")
    args = parser.parse_args()

    side_by_side.set_up(args)

    from iv2_jax.interop import torch_keys

    student = student_config(args)
    inputs = make_inputs(student, args.batch)
    train, tokens = not args.forward, inputs["visible"].shape[1]
    config, keys, step, other = student, torch_keys.student_map, jax_step, torch_step
    if args.forward:
        config, tokens = student.encoder, student.encoder.num_tokens
        keys, step, other = torch_keys.encoder_map, jax_forward, torch_forward
    params = torch_side.random_params(torch_keys.abstract_params(keys(config)))
    variants = []
    for unroll in args.unroll:
        encoder = dataclasses.replace(student.encoder, scan_unroll=unroll)
        ours = dataclasses.replace(student, encoder=encoder) if train else encoder
        variants.append(Variant(f"ours, unroll {unroll}", step(ours, params, inputs)))
    variants += torch_side.variants(args, functools.partial(other, config, params, inputs))
    shapes = products(config, args.batch, tokens, train=train)
    if not args.only_ours:
        variants.append(torch_side.products(shapes, args.threads))
    gigaflop = torch_side.gigaflop(shapes)
    print(f"{tokens} tokens a clip, {gigaflop:.1f} GFLOP of matrix products")
    side_by_side.compare(variants, args, {"tokens": tokens, "gigaflop": gigaflop})
    return 0


if __name__ == "__main__":
    sys.exit(main())
