"""Times the same step taken by several programs, turn by turn in one run.

Variants take turns within every round, so that a change of the machine's speed hits all alike;
medians are compared. Compilation is outside the timing and given apart. The first losses must
agree, or nothing is reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iv2_jax.parallel.cpu import keep_freed_pages

QUIET_SHARE = 0.92  # idle share of the CPUs below which a run says that it does not count
LOSS_LIMIT = 1e-4


@dataclasses.dataclass
class Variant:
    """One way to take the step.

    Attributes:
        name: its row.
        step: takes one step and returns the loss, waiting for the result.
        first_seconds: of the first call, compilation included.
        losses: of every step taken.
        wall: seconds of the timed steps.
        cpu: CPU seconds of the timed steps, over all threads.
        has_loss: whether what `step` returns is the loss, to be compared.
    """

    name: str
    step: Callable[[], float]
    has_loss: bool = True
    first_seconds: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def warm_up(self, calls: int) -> None:
        """Compiles and settles."""
        start = time.perf_counter()
        self.losses.append(self.step())
        self.first_seconds = time.perf_counter() - start
        self.losses.extend(self.step() for _ in range(calls - 1))

    def take(self) -> None:
        """Takes one timed step."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.losses.append(self.step())
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)


def idle_share(seconds: float) -> float:
    """Share of CPU time that nobody used over `seconds`."""

    def read() -> tuple[int, int]:
        fields = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return fields[3] + fields[4], sum(fields)

    idle, total = read()
    time.sleep(seconds)
    idle_after, total_after = read()
    return (idle_after - idle) / max(total_after - total, 1)


def wait_until_quiet(patience: float) -> float:
    """Waits for an idle machine, at most `patience` seconds; returns the last idle share."""
    deadline = time.monotonic() + patience
    share = idle_share(3)
    while share < QUIET_SHARE and time.monotonic() < deadline:
        time.sleep(10)
        share = idle_share(3)
    return share


def check_losses(variants: list[Variant]) -> None:
    """Stops when the first losses say that the sides do not compute the same."""
    reference = variants[0].losses
    for variant in (v for v in variants[1:] if v.has_loss):
        for index in range(3):
            if not abs(variant.losses[index] - reference[index]) < LOSS_LIMIT:
                sys.exit(
                    f"loss {index} of {variant.name} is {variant.losses[index]:.6f}, of "
                    f"{variants[0].name} {reference[index]:.6f}: not the same step"
                )


def report(variants: list[Variant], ours: Variant, idle: list[float]) -> dict[str, Any]:
    """Prints the table; returns it as plain values."""
    titles = {"median s": 10, "min": 8, "max": 8, "CPU s": 8, "first s": 9}
    titles |= {"ours/it": 9, "by CPU": 9}
    print("variant".ljust(26) + "".join(title.rjust(width) for title, width in titles.items()))
    rows = []
    median, cpu = statistics.median(ours.wall), statistics.median(ours.cpu)
    for variant in variants:
        row = {
            "name": variant.name,
            "median": statistics.median(variant.wall),
            "min": min(variant.wall),
            "max": max(variant.wall),
            "cpu": statistics.median(variant.cpu),
            "first": variant.first_seconds,
            "ratio": median / statistics.median(variant.wall),
            "cpu_ratio": cpu / statistics.median(variant.cpu),
            "wall": variant.wall,
            "cpu_times": variant.cpu,
        }
        rows.append(row)
        print(
            f"{row['name']:26}{row['median']:10.3f}{row['min']:8.3f}{row['max']:8.3f}"
            f"{row['cpu']:8.2f}{row['first']:9.1f}{row['ratio']:9.3f}"
            f"{row['cpu_ratio']:9.3f}"
        )
    quiet = min(idle) >= QUIET_SHARE
    load = os.getloadavg()[0]
    verdict = "" if quiet else ": wall times DO NOT COUNT, believe the CPU times"
    print(f"load {load:.1f}; idle before {idle[0]:.0%}, after {idle[1]:.0%}{verdict}")
    return {"variants": rows, "idle": idle, "quiet": quiet, "load": load}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every such benchmark takes."""
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each variant")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps of each, at least 3")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--plain-malloc",
        action="store_true",
        help="leave malloc as it is; else it keeps freed memory, as in `iv2 train`, for both sides",
    )
    parser.add_argument("--only-ours", action="store_true", help="leave PyTorch out")
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for quiet")
    parser.add_argument("--json", help="write the figures there")


def set_up(args: argparse.Namespace) -> None:
    """Gives all variants the same CPUs and precision; before jax or torch is imported."""
    if not args.plain_malloc and not keep_freed_pages():
        sys.exit("glibc's mallopt is not here: --plain-malloc")
    # Both sides see the same CPUs; XLA sizes its thread pool by them, torch is told.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")


def compare(variants: list[Variant], args: argparse.Namespace, facts: Mapping[str, Any]) -> None:
    """Warms the variants up, times them in turns, prints the table and writes `args.json`.

    The first variant is ours. `facts` go into the JSON.
    """
    for variant in variants:
        variant.warm_up(max(args.warmup, 3))
    check_losses(variants)
    idle = [wait_until_quiet(args.patience)]
    for _ in range(args.rounds):
        for variant in variants:
            # OpenMP threads go on spinning for a moment after torch's last parallel region.
            time.sleep(0.2)
            variant.take()
    idle.append(idle_share(3))
    figures = report(variants, variants[0], idle)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        figures |= {"settings": settings, **facts}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")
