"""What the training loop adds to its steps, and how long a checkpoint holds it up.

    python benchmarks/loop_overhead.py --json runs/loop_overhead.json

The real loop (`iv2_jax.train.loop`: metrics, goodput, watchdog, checks, checkpoints) runs steps of
a known length: each sleeps `--step` seconds in a callback on the device and updates parameters and
moments of the size of `--config`'s. Reported are

- the time between two sleeps and the CPU time of the loop's thread per step, which a busy machine
  disturbs less, both less those of the same compiled step in a bare loop: what is left is ours,
- the time between two sleeps where a checkpoint is begun, against a real step of `--config` (on
  zeros, its teachers included), taken in the same run.

The exit code is 1 where the loop's CPU time is above `--goal` of a step, or a checkpoint holds the
loop up for longer than a real step.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.parallel import cpu

os.environ.setdefault("JAX_PLATFORMS", "cpu")
cpu.set_up()  # as `iv2 train` does, before JAX starts

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from iv2_jax.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from iv2_jax.train import loop  # noqa: E402
from iv2_jax.train.checkpoint import CheckpointConfig  # noqa: E402
from iv2_jax.train.program import build_program, put_frozen  # noqa: E402
from iv2_jax.train.stage import RunConfig, Stage  # noqa: E402


class Timeline:
    """When the device's steps begin and end, and the loop thread's CPU time at each batch."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        self.loop_cpu: list[float] = []

    def work(self, seconds: np.ndarray) -> np.ndarray:
        """One step."""
        start = time.perf_counter()
        time.sleep(float(seconds[0]))
        self.spans.append((start, time.perf_counter()))
        return np.zeros((), np.float32)

    def gaps(self) -> list[float]:
        """Seconds before each step but the first in which the device did nothing."""
        return [b[0] - a[1] for a, b in zip(self.spans, self.spans[1:], strict=False)]


@dataclass(frozen=True, kw_only=True)
class SleepingConfig(RunConfig):
    """A run of sleeping steps.

    Attributes:
      file: Config whose stage's parameters it has.
      seconds: Of a step.
      timeline: Where the times go.
    """

    file: str
    seconds: float
    timeline: Timeline = field(init=False, default_factory=Timeline)

    def make_stage(self) -> SleepingStage:
        """The stage."""
        return SleepingStage(self)


class SleepingStage(Stage):
    """Steps of a known length over the parameters of another stage."""

    def __init__(self, config: SleepingConfig) -> None:
        self.config = config
        self.real = real_config(config.file).make_stage()

    def init_params(self, rng: jax.Array) -> Any:
        """The other stage's."""
        return self.real.init_params(rng)

    def abstract_frozen(self) -> Any:
        """None."""
        return {}

    def abstract_batches(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One number a clip."""
        return {"": {"x": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}}

    def loss_fn(
        self, params: Any, frozen: Any, batch: Any, rng: jax.Array, *, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Sleeps; the loss pulls the parameters to zero."""
        slept = jax.pure_callback(
            self.config.timeline.work, jax.ShapeDtypeStruct((), jnp.float32), batch["x"]
        )
        size = sum(jnp.mean(jnp.square(x)) for x in jax.tree.leaves(params))
        return size + slept, {"size": size}

    def tokens_per_clip(self, kind: str = "") -> int:
        """One."""
        return 1

    def train_batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Asked for by the loop's thread, once a step."""
        rows = self.config.batch_size
        while True:
            self.config.timeline.loop_cpu.append(time.thread_time())
            x = np.full(rows, self.config.seconds, np.float32)
            yield {"x": x, "index": np.arange(rows, dtype=np.int32)}

    def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """None."""
        yield from ()


def real_config(file: str) -> RunConfig:
    """The config in a file, for one device."""
    return loop.read_config(file, {"mesh.max_devices": "1"})


def real_step(config: RunConfig, steps: int) -> float:
    """Median seconds of the config's own step, on zeros in place of clips."""
    mesh = make_mesh(config.mesh)
    stage = config.make_stage()
    program = build_program(config, stage, mesh)
    state, frozen = program.init(jax.random.key(0)), put_frozen(stage, mesh, config.mesh)
    kind, shapes = next(iter(program.abstract_batches.items()))
    batch = {n: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for n, x in shapes.items()}
    step, times = program.compile_steps()[kind], []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, frozen, batch, jax.random.key(0)))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def bare_run(config: SleepingConfig, steps: int) -> tuple[list[float], list[float]]:
    """Gaps and the thread's CPU times of the same steps in a loop that does nothing else."""
    mesh, stage = make_mesh(config.mesh), config.make_stage()
    program = build_program(config, stage, mesh)
    state, key = program.init(jax.random.key(0)), jax.random.key(0)
    step, batches = program.compile_steps()[""], stage.train_batches(0)
    for _ in range(steps):
        batch = loop.to_device(next(batches), stage.host_arrays, mesh)
        state, metrics = step(state, {}, batch, key)
        float(metrics["loss"])
    jax.block_until_ready(state)
    timeline = config.timeline
    gaps, cpu_times = timeline.gaps()[2:], np.diff(timeline.loop_cpu)[2:]
    timeline.spans.clear()
    timeline.loop_cpu.clear()
    return gaps, list(cpu_times)


def sleeping_run(args: argparse.Namespace, real: RunConfig, workdir: Path) -> dict[str, Any]:
    """Runs the loop; gaps and CPU times in seconds, apart for steps after a checkpoint's."""
    config = SleepingConfig(
        stage="sleeping",
        steps=args.steps,
        batch_size=8,
        optimizer=real.optimizer,
        mesh=MeshConfig(max_devices=1),
        checkpoint=CheckpointConfig(every=args.checkpoint_every),
        file=args.config,
        seconds=args.step,
    )
    bare_gaps, bare_cpu = bare_run(config, args.steps // 2)
    loop.train(config, workdir)
    timeline = config.timeline
    gaps = dict(enumerate(timeline.gaps(), start=1))  # by the step before
    loop_cpu = np.diff(timeline.loop_cpu)
    saved = [s for s in gaps if s % args.checkpoint_every == 0]
    near = {s + d for s in saved for d in (0, 1)} | {1, 2}  # a step after a save shares the disk
    return {
        "bare_gaps": bare_gaps,
        "bare_cpu": bare_cpu,
        "gaps": [gap for step, gap in gaps.items() if step not in near],
        "checkpoint_gaps": [gaps[step] for step in saved],
        "loop_cpu": [c for step, c in enumerate(loop_cpu, 1) if step not in near],
        "steps": [b - a for a, b in timeline.spans],
        "bytes": sum(f.stat().st_size for f in workdir.glob("checkpoints/*/**/*") if f.is_file()),
    }


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo/stage1.py")
    parser.add_argument("--step", type=float, default=0.5, help="seconds of a sleeping step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--checkpoint-every", type=int, default=10)
    parser.add_argument(
        "--real-step", type=float, help="seconds of a real step, where they are known"
    )
    parser.add_argument("--goal", type=float, default=0.01, help="share of a step")
    parser.add_argument("--json", help="write the figures there")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    real = real_config(args.config)
    before = os.getloadavg()[0]
    step = args.real_step or real_step(real, 10)
    with tempfile.TemporaryDirectory() as folder:
        figures = sleeping_run(args, real, Path(folder))
    middle = {key: statistics.median(v) for key, v in figures.items() if isinstance(v, list)}
    gap, own = middle["gaps"], middle["loop_cpu"]
    more = own - middle["bare_cpu"]
    held = statistics.median(figures["checkpoint_gaps"])
    added = (gap - middle["bare_gaps"]) / args.step
    print(
        f"between sleeps of {args.step} s: median {1e3 * gap:.2f} ms, bare "
        f"{1e3 * middle['bare_gaps']:.2f}: the loop adds {added:.2%}"
    )
    print(
        f"CPU time of the loop's thread: median {1e3 * own:.2f} ms a step, bare "
        f"{1e3 * middle['bare_cpu']:.2f}: the loop adds {more / args.step:.2%}"
    )
    print(
        f"a checkpoint holds the loop up for {1e3 * held:.0f} ms (median), "
        f"{1e3 * max(figures['checkpoint_gaps']):.0f} ms at most; a real step takes "
        f"{1e3 * step:.0f} ms"
    )
    print(f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after")
    if args.json:
        figures |= {"settings": vars(args), "real_step": step, "load": before}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
    return int(more > args.goal * args.step or held > step)


if __name__ == "__main__":
    sys.exit(main())
