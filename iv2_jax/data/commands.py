"""`iv2 data`: check, pack and time the data of a run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable

from iv2_jax.data.instruct import command as dialogues
from iv2_jax.errors import ConfigError

TAKES_OVERRIDES = True  # of teacher-features

_EXAMPLES = """examples:
  iv2 data validate clips.jsonl                      every line, file and frame
  iv2 data validate train.csv --format kinetics --prefix /videos --quick
  iv2 data build clips.jsonl packed --short-side 256 --gop 16
  iv2 data convert-dialogues train.json train_llava.json --to llava
  iv2 data bench packed --frames 16 --target 200     cores for 200 clips a second
  iv2 data teacher-features --config configs/demo/stage1.py --out targets
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands of `iv2 data`."""
    parser.description = __doc__
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_validate(commands)
    _add_build(commands)
    _add_bench(commands)
    _add_teacher_features(commands)
    dialogues.add_command(commands)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand that was parsed; returns the exit code."""
    if getattr(args, "overrides", None) and args.data_command != "teacher-features":
        raise ConfigError(f"unknown arguments: {' '.join(args.overrides)}")
    commands = {
        "validate": _validate,
        "build": _build,
        "bench": _bench,
        "teacher-features": _teacher_features,
        dialogues.NAME: dialogues.run,
    }
    return commands[args.data_command](args)


def _add_list_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how a manifest is read."""
    parser.add_argument(
        "--format",
        default="auto",
        help="jsonl, json, annotations, pretrain, kinetics, frames or interval (default: told by "
        "content)",
    )
    parser.add_argument("--prefix", default="", help="folder or URL of relative paths")
    parser.add_argument("--separator", help="column separator of text lists")


def _add_validate(commands: argparse._SubParsersAction) -> None:
    """Arguments of `validate`."""
    parser = commands.add_parser(
        "validate",
        help="check every line of a manifest and every file it names",
        description="Checks a manifest: syntax and types of every line, that files exist, and "
        "that they decode. Prints problems as file:line: field: what, then what is good. The exit "
        "code is 1 if there is a problem.",
        epilog="example: iv2 data validate clips.jsonl --quick",
    )
    parser.add_argument("manifest")
    _add_list_options(parser)
    parser.add_argument("--quick", action="store_true", help="decode only the first frame of each")
    parser.add_argument("--threads", type=int, help="files at a time (default: processors)")
    parser.add_argument("--json", metavar="FILE", help="write the findings as JSON")


def _add_build(commands: argparse._SubParsersAction) -> None:
    """Arguments of `build`."""
    parser = commands.add_parser(
        "build",
        help="pack clips into ArrayRecord files",
        description="Packs the clips of a manifest into a TFDS data set of ArrayRecord files, "
        "which train and eval read like a manifest. Clips with start and end are cut.",
        epilog="example: iv2 data build clips.jsonl packed --short-side 256 --gop 16",
    )
    parser.add_argument("manifest")
    parser.add_argument("folder", help="folder to make")
    _add_list_options(parser)
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--name", default="clips", help="name of the data set (default: clips)")
    parser.add_argument("--short-side", type=int, help="encode anew, short side at most this")
    parser.add_argument("--gop", type=int, help="encode anew, a keyframe every so many frames")
    parser.add_argument("--no-audio", action="store_true", help="drop sound when encoding anew")
    parser.add_argument(
        "--shard-mib", type=int, default=256, help="size of a file in MiB (default: 256)"
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.1,
        help="share of clips that may fail to decode and be left out (default: 0.1)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    """Arguments of `bench`."""
    parser = commands.add_parser(
        "bench",
        help="measure clips a second",
        description="Measures how many clips a second this machine loads with 1 to N worker "
        "processes, and what a clip's time goes into.",
        epilog="example: iv2 data bench clips.jsonl --frames 8 --target 200",
    )
    parser.add_argument("source", help="manifest or packed folder")
    _add_list_options(parser)
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--frames", type=int, default=8, help="frames a clip (default: 8)")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures (default: 224)")
    parser.add_argument("--sampling", default="pretrain", help="sampling rule (default: pretrain)")
    parser.add_argument("--workers", help="numbers of workers, e.g. 1,2,4 (default: up to cores)")
    parser.add_argument("--batch", type=int, default=8, help="clips a batch (default: 8)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each (default: 5)")
    parser.add_argument("--target", type=float, help="clips a second that a run needs")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON")


def _add_teacher_features(commands: argparse._SubParsersAction) -> None:
    """Arguments of `teacher-features`."""
    parser = commands.add_parser(
        "teacher-features",
        help="run the teachers of a stage-1 config once over its clips",
        description="Writes what the teachers of a stage-1 config give for each of its clips. "
        "A run with config.teacher_features=FOLDER reads that instead of running the teachers; "
        "it sees every clip in one view and draws new masks every time.",
        epilog="example: iv2 data teacher-features --config configs/demo/stage1.py --out targets "
        "--config.data.source=clips.jsonl --config.eval_data.source=clips.jsonl",
    )
    parser.add_argument("--config", required=True, help="config file of the run")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")


def _validate(args: argparse.Namespace) -> int:
    """`iv2 data validate`."""
    import dataclasses

    from tqdm import tqdm

    from iv2_jax.data import validate

    with tqdm(unit="clip", disable=None) as bar:

        def progress(n: int) -> None:
            if n < 0:
                bar.reset(-n)
            else:
                bar.update(n)

        report = validate.check(
            args.manifest,
            format=args.format,
            prefix=args.prefix,
            separator=args.separator,
            quick=args.quick,
            threads=args.threads,
            progress=progress,
        )
    for problem in report.problems:
        print(problem.describe(report.manifest))
    for oddity in report.odd:
        print(f"{oddity.describe(report.manifest)} (odd, but usable)")
    for line in validate.summary(report):
        print(line)
    if args.json:
        found = {
            "manifest": report.manifest,
            "good": len(report.good),
            "problems": [dataclasses.asdict(p) for p in report.problems],
            "odd": [dataclasses.asdict(p) for p in report.odd],
        }
        _write_json(args.json, found)
    return 1 if report.problems else 0


def _build(args: argparse.Namespace) -> int:
    """`iv2 data build`."""
    from tqdm import tqdm

    from iv2_jax.data import manifest
    from iv2_jax.data.builders import packed

    clips = manifest.read_clips(
        args.manifest,
        format=args.format,
        prefix=args.prefix,
        split=args.split,
        separator=args.separator,
    )
    options = packed.PackOptions(
        name=args.name,
        shard_bytes=args.shard_mib << 20,
        short_side=args.short_side,
        gop=args.gop,
        keep_audio=not args.no_audio,
        max_bad_share=args.max_bad_share,
        overwrite=args.overwrite,
    )
    with tqdm(total=len(clips), unit="clip", disable=None) as bar:
        report = packed.build(clips, args.folder, options, progress=bar.update)
    for path, reason in report.left_out:
        print(f"left out: {path}: {reason}", file=sys.stderr)
    for path, reason in report.sounds_left_out:
        print(f"sound left out: {path}: {reason}", file=sys.stderr)
    shards = ", ".join(f"{split} {count}" for split, count in report.shards.items())
    print(
        f"{args.folder}: {report.clips} of {len(clips)} clips, {report.bytes / 1e6:.1f} MB, "
        f"files: {shards}"
    )
    return 0


def _teacher_features(args: argparse.Namespace) -> int:
    """`iv2 data teacher-features`."""
    from tqdm import tqdm

    from iv2_jax import config as config_lib
    from iv2_jax.train import loop
    from iv2_jax.train.distill import DistillConfig
    from iv2_jax.train.teacher_features import write_teacher_features

    config = loop.read_config(args.config, config_lib.split_overrides(args.overrides))
    if not isinstance(config, DistillConfig):
        raise ConfigError(
            f"{args.config} is a run of stage {config.stage!r}, which has no teachers"
        )
    with tqdm(desc="teachers", unit="clip", disable=None) as bar:

        def progress(total: int) -> Callable[[], None]:
            bar.reset(total)
            return bar.update

        written = write_teacher_features(
            config, args.out, overwrite=args.overwrite, progress=progress
        )
    print(f"{args.out}: {', '.join(f'{count} clips of {part}' for part, count in written.items())}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    """`iv2 data bench`."""
    import dataclasses

    from iv2_jax.data import bench, sources
    from iv2_jax.data.pipeline import DataConfig

    machine = bench.machine()
    source = sources.open_source(
        args.source,
        format=args.format,
        prefix=args.prefix,
        split=args.split,
        separator=args.separator,
    )
    config = DataConfig(
        source=args.source, num_frames=args.frames, size=args.size, sampling=args.sampling
    )
    split = bench.measure_split(source, config, max(min(len(source), 64), 16))
    print(
        f"one clip of {args.frames} frames: open {split.open_ms:.1f} ms, decode "
        f"{split.decode_ms:.1f} ms, transform {split.transform_ms:.1f} ms "
        f"(medians of {split.clips}; {split.clips_per_second:.1f} clips/s a core)"
    )
    workers = _workers(args.workers)
    print(f"{'workers':>8} {'clips/s':>9} {'per worker':>11}")
    measured = []
    for result in bench.measure_throughput(
        source, config, workers, batch=args.batch, seconds=args.seconds
    ):
        measured.append(result)
        print(f"{result.workers:>8} {result.clips_per_second:>9.1f} {result.per_worker:>11.1f}")
    figures = {
        **machine,
        "source": os.fspath(args.source),
        "frames": args.frames,
        "size": args.size,
        "clip_ms": dataclasses.asdict(split),
        "throughput": [dataclasses.asdict(m) for m in measured],
    }
    if args.target:
        figures["target"] = args.target
        figures["cores_for_target"] = cores = bench.cores_for(args.target, measured)
        print(f"{args.target:g} clips/s need about {cores} such cores")
    if machine["load_before"] > 1:
        print(f"the machine was busy (load {machine['load_before']:.1f}): figures are too low")
    if args.json:
        _write_json(args.json, figures)
    return 0


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


def _write_json(path: str, figures: dict) -> None:
    """Writes figures, or says why not."""
    from iv2_jax.errors import DataError

    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)
            file.write("\n")
    except OSError as e:
        raise DataError(f"{path}: cannot be written: {e.strerror}") from e
