"""Time to compile the 6B encoder's forward against the 1B's: blocks are scanned, so it is alike.

    python benchmarks/compile_time.py                  # for this machine's CPU
    python benchmarks/compile_time.py --target v5e     # for a TPU chip that is not here
    python benchmarks/compile_time.py --unroll 40      # what it would be without the scan

Shapes are abstract and nothing is allocated, so the 6B model fits any machine. The models take
turns within every round, so that a change of the machine's speed hits both alike. Tracing and
compiling are given apart, with the CPU time beside the wall time: on a busy machine the CPU time
is the one to look at, and the one that `--goal` is held against (exit code 1 above it). The v5e
target needs the TPU compiler (`pip install 'iv2_jax[tpu]'`), no TPU, and half a minute of CPU time
for each compilation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = ("cpu", "v5e")


@dataclasses.dataclass
class Timing:
    """Seconds of one model's rounds.

    Attributes:
        trace: tracing and lowering.
        compile: compiling, wall time.
        cpu: both, CPU time over all threads.
    """

    trace: list[float] = dataclasses.field(default_factory=list)
    compile: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """Medians over the rounds, and of the wall time of both parts together."""
        total = [a + b for a, b in zip(self.trace, self.compile, strict=True)]
        return {
            "trace": statistics.median(self.trace),
            "compile": statistics.median(self.compile),
            "wall": statistics.median(total),
            "cpu": statistics.median(self.cpu),
        }


def make_compile(name: str, args: argparse.Namespace) -> Callable[[Timing], None]:
    """Gives what compiles a named encoder's forward once and notes the times."""
    import jax
    import jax.numpy as jnp

    from iv2_jax.kernels.choice import prefer_backend
    from iv2_jax.models import zoo
    from iv2_jax.models.layers import Precision
    from iv2_jax.models.video_encoder import VideoEncoder

    config = dataclasses.replace(
        zoo.get(name),
        num_frames=args.frames,
        scan_unroll=args.unroll,
        precision=Precision(args.dtype, args.dtype),
    )
    size = config.image_size
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(args.dtype)),
        zoo.abstract_params(config),
    )
    video = jax.ShapeDtypeStruct((args.batch, config.num_frames, size, size, 3), jnp.float32)
    sharding = jax.sharding.SingleDeviceSharding(device(args.target))
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        (params, video),
    )

    def forward(params: Any, video: jax.Array) -> jax.Array:
        return VideoEncoder(config).apply({"params": params}, video).pooled

    def run(timing: Timing) -> None:
        jax.clear_caches()
        start, cpu = time.perf_counter(), time.process_time()
        with prefer_backend(args.attention):
            lowered = jax.jit(forward).lower(*inputs)
        traced = time.perf_counter()
        lowered.compile()
        timing.trace.append(traced - start)
        timing.compile.append(time.perf_counter() - traced)
        timing.cpu.append(time.process_time() - cpu)

    return run


def device(target: str) -> Any:
    """The device to compile for; for a TPU, one of a slice that is only described."""
    import jax

    if target == "cpu":
        return jax.devices("cpu")[0]
    from iv2_jax.parallel.described import topology

    return topology(f"{target}:2x2").devices()[0]


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, default="cpu")
    parser.add_argument("--models", nargs=2, default=["internvideo2_1b", "internvideo2_6b"])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--unroll", type=int, default=1, help="blocks in one turn of the scan")
    parser.add_argument("--attention", help="default: what the target would choose")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--goal", type=float, default=1.5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    args.attention = args.attention or ("xla" if args.target == "cpu" else "pallas")
    return args


def main() -> int:
    """Compiles both models in turns and prints the ratio."""
    args = parse()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    runs = {name: make_compile(name, args) for name in args.models}
    for run in runs.values():
        run(Timing())  # imports, the compiler's own start
    timings = {name: Timing() for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            run(timings[name])
    medians = {name: timing.medians() for name, timing in timings.items()}
    print(f"forward of {args.frames} frames for {args.target}, {args.attention} attention, seconds")
    print(f"{'':24}{'trace':>8}{'compile':>9}{'wall':>8}{'CPU':>8}")
    for name, row in medians.items():
        print(
            f"{name:24}{row['trace']:8.2f}{row['compile']:9.2f}{row['wall']:8.2f}{row['cpu']:8.2f}"
        )
    first, second = medians.values()
    ratios = {key: second[key] / first[key] for key in ("wall", "cpu")}
    print(f"ratio: wall {ratios['wall']:.2f}, CPU {ratios['cpu']:.2f} (goal: {args.goal} or less)")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"settings": settings, "seconds": medians, "ratio": ratios}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(ratios["cpu"] > args.goal)


if __name__ == "__main__":
    sys.exit(main())
