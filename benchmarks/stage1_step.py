"""One stage-1 training step of ours against the same step in plain PyTorch, on the CPU.

    python benchmarks/stage1_step.py --json runs/stage1_step.json

Both sides take the same step: S-sized student (width 384, depth 12), 8 frames of 224 px, 417 of
2049 tokens, one decoder for each teacher, batch 2, targets precomputed and gathered, three-term
loss, backward, AdamW, float32, the same number of threads, the same weights at the start. The
PyTorch side is `interop/torch_models/video.py` with plain or fused attention, eager or compiled.

Variants take turns within every round, so that a change of the machine's speed hits all alike;
medians are compared. Compilation is outside the timing and given apart. The first losses must
agree, or nothing is reported. Takes about 4 minutes on two cores.
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


def random_params(config: Any) -> Any:
    """Weights both sides start from, of the size of the model's own initialisation."""
    import jax
    from flax import traverse_util

    from iv2_jax.interop import torch_keys

    rng = np.random.default_rng(1)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path.rsplit("/", 1)[-1]
        if name in ("scale", "gamma"):
            return np.full(leaf.shape, 1.0 if name == "scale" else 1e-5, np.float32)
        return 0.02 * rng.normal(size=leaf.shape).astype(np.float32)

    abstract = torch_keys.abstract_params(torch_keys.student_map(config))
    flat = traverse_util.flatten_dict(abstract, sep="/")
    return traverse_util.unflatten_dict({k: draw(k, v) for k, v in flat.items()}, sep="/")


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
    state = torch_keys.to_torch(params, torch_keys.student_map(config))
    model.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in state.items()})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY
    )
    video = torch.from_numpy(inputs["video"].transpose(0, 4, 1, 2, 3).copy())
    hidden = np.ones((len(video), config.encoder.num_tokens), bool)
    np.put_along_axis(hidden, inputs["visible"], False, axis=1)
    mask = torch.from_numpy(hidden)
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


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    side_by_side.add_arguments(parser)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--gelu", choices=("erf", "tanh"), default="erf")
    parser.add_argument("--unroll", type=int, nargs="+", default=[1], help="blocks per scan turn")
    args = parser.parse_args()

    side_by_side.set_up(args)

    config = student_config(args)
    inputs, params = make_inputs(config, args.batch), random_params(config)
    variants = []
    for unroll in args.unroll:
        encoder = dataclasses.replace(config.encoder, scan_unroll=unroll)
        ours = dataclasses.replace(config, encoder=encoder)
        variants.append(Variant(f"ours, unroll {unroll}", jax_step(ours, params, inputs)))
    if not args.only_ours:
        import torch

        torch.set_num_threads(args.threads)
        for compiled in (False,) if args.no_compile else (False, True):
            for fused in (False, True):
                name = f"torch {'sdpa' if fused else 'plain'} {'compile' if compiled else 'eager'}"
                step = torch_step(config, params, inputs, fused=fused, compiled=compiled)
                variants.append(Variant(name, step))
    side_by_side.compare(variants, args, {"tokens": inputs["visible"].shape[1]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
