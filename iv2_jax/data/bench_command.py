"""`iv2 data bench`: how fast this machine reads clips, and how much memory that takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from iv2_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from iv2_jax.data.data_config import DataConfig
    from iv2_jax.data.sources import ClipSource

NAME = "bench"
_CLIPS = (16, 64)  # fewest and most clips that are timed one after another


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand and its arguments."""
    parser = commands.add_parser(
        NAME,
        help="measure clips a second",
        description="Measures how many clips a second this machine loads with 1 to N worker "
        "processes, what a clip's time goes into, and how much memory a worker takes. Several "
        "sources (a list, and what `iv2 data build` made of it) are compared with the first.",
        epilog="examples: iv2 data bench clips.jsonl --frames 8 --target 200; "
        "iv2 data bench clips.jsonl packed --workers 2; iv2 data bench packed --memory 2000",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="manifest or packed folder")
    parser.add_argument("--format", default="auto", help="of the manifests (default: by content)")
    parser.add_argument("--prefix", default="", help="folder or URL of relative paths")
    parser.add_argument("--separator", help="column separator of text lists")
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--frames", type=int, default=8, help="frames a clip (default: 8)")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures (default: 224)")
    parser.add_argument("--sampling", default="pretrain", help="sampling rule (default: pretrain)")
    parser.add_argument(
        "--augment",
        default="multiscale_crop",
        help="as data.augment; center takes stored crops as they are (default: multiscale_crop)",
    )
    parser.add_argument("--workers", help="numbers of workers, e.g. 1,2,4 (default: up to cores)")
    parser.add_argument("--batch", type=int, default=8, help="clips a batch (default: 8)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each (default: 5)")
    parser.add_argument("--target", type=float, help="clips a second that a run needs")
    parser.add_argument(
        "--memory",
        type=int,
        metavar="CLIPS",
        help="instead: read so many clips in one worker process and show its memory",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """`iv2 data bench`."""
    from iv2_jax.data import bench

    machine = bench.machine()
    figures: list[dict[str, Any]] = []
    for path in args.sources:
        source, config = _open(path, args)
        if len(args.sources) > 1:
            print(f"{path}:")
        measure = _memory if args.memory else _speed
        figures.append({"source": os.fspath(path)} | measure(source, config, args))
        if len(figures) > 1 and not args.memory:
            _compare(figures)
    if machine["load_before"] > 1:
        print(f"the machine was busy (load {machine['load_before']:.1f}): figures are too low")
    if args.json:
        settings = {"frames": args.frames, "size": args.size, "augment": args.augment}
        whole = machine | settings | figures[0] | ({"others": figures[1:]} if figures[1:] else {})
        write_json(args.json, whole)
    return 0


def _open(path: str, args: argparse.Namespace) -> tuple[ClipSource, DataConfig]:
    """A source, and the settings of its loader."""
    from iv2_jax.data import sources
    from iv2_jax.data.pipeline import DataConfig

    source = sources.open_source(
        path, format=args.format, prefix=args.prefix, split=args.split, separator=args.separator
    )
    config = DataConfig(
        source=path,
        num_frames=args.frames,
        size=args.size,
        sampling=args.sampling,
        augment=args.augment,
    )
    return source, config


def _speed(source: ClipSource, config: DataConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Times of a clip, and clips a second."""
    from iv2_jax.data import bench

    fewest, most = _CLIPS
    split = bench.measure_split(source, config, max(min(len(source), most), fewest))
    print(
        f"one clip of {args.frames} frames: open {split.open_ms:.1f} ms, decode "
        f"{split.decode_ms:.1f} ms, transform {split.transform_ms:.1f} ms "
        f"(medians of {split.clips}; {split.clips_per_second:.1f} clips/s a core)"
    )
    if split.reads:
        print("videos " + ", ".join(f"{name} {count}" for name, count in split.reads.items()))
    print(f"{'workers':>8} {'clips/s':>9} {'per worker':>11} {'MiB a worker':>13}")
    measured = []
    for result in bench.measure_throughput(
        source, config, _workers(args.workers), batch=args.batch, seconds=args.seconds
    ):
        measured.append(result)
        print(
            f"{result.workers:>8} {result.clips_per_second:>9.1f} {result.per_worker:>11.1f} "
            f"{result.worker_mib:>13.0f}"
        )
    figures: dict[str, Any] = {
        "clip_ms": dataclasses.asdict(split),
        "throughput": [dataclasses.asdict(m) for m in measured],
    }
    if args.target:
        figures["target"] = args.target
        figures["cores_for_target"] = cores = bench.cores_for(args.target, measured)
        print(f"{args.target:g} clips/s need about {cores} such cores")
    return figures


def _memory(source: ClipSource, config: DataConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Memory of a worker as it goes through the clips."""
    from iv2_jax.data import bench

    print(f"{'clips':>8} {'MiB':>8}")
    points = []
    for point in bench.measure_memory(source, config, args.memory, batch=args.batch):
        points.append(point)
        print(f"{point.clips:>8} {point.mib:>8.1f}", flush=True)
    half = bench.growth(points)
    print(f"growth from the second quarter to the last: {half:+.1f} MiB")
    return {"memory": [dataclasses.asdict(p) for p in points], "growth_mib": half}


def _compare(figures: list[dict[str, Any]]) -> None:
    """Says how much less a clip of the last source takes than one of the first."""
    first, last = (sum(f["clip_ms"][k] for k in _STEPS) for f in (figures[0], figures[-1]))
    best = [max(m["clips_per_second"] for m in f["throughput"]) for f in figures]
    print(
        f"reading a clip takes {last:.1f} ms in the place of {first:.1f} ({first / last:.1f} times "
        f"cheaper); {best[-1] / best[0]:.1f} times the clips a second"
    )


_STEPS = ("open_ms", "decode_ms", "transform_ms")


def _workers(text: str | None) -> list[int]:
    """Numbers of workers to measure: as given, else powers of two up to the cores."""
    if text is None:
        cores = os.cpu_count() or 1
        return sorted({1 << i for i in range(cores.bit_length()) if 1 << i <= cores} | {cores})
    try:
        workers = [int(n) for n in text.split(",")]
    except ValueError:
        raise ConfigError(f"--workers must be numbers such as 1,2,4, is {text!r}") from None
    if min(workers) < 1:
        raise ConfigError(f"--workers must be from 1 on, is {text!r}")
    return workers


def write_json(path: str, figures: dict[str, Any]) -> None:
    """Writes figures.

    Raises:
      DataError: the file cannot be written.
    """
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
            file.write("\n")
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror}") from e
