"""`iv2 data`: check, pack and time the data of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from iv2_jax.data import bench_command
from iv2_jax.data.instruct import command as dialogues
from iv2_jax.errors import ConfigError

TAKES_OVERRIDES = True  # of teacher-features

_EXAMPLES = """examples:
  iv2 data validate clips.jsonl                      every line, file and frame
  iv2 data validate train.csv --format kinetics --prefix /videos --quick
  iv2 data build clips.jsonl packed --short-side 256 --keyframe-interval 16
  iv2 data build clips.jsonl crops --frames 8 --crop 224
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
    bench_command.add_command(commands)
    _add_teacher_features(commands)
    dialogues.add_command(commands)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand that was parsed; returns the exit code."""
    if getattr(args, "overrides", None) and args.data_command != "teacher-features":
        raise ConfigError(f"unknown arguments: {' '.join(args.overrides)}")
    commands = {
        "validate": _validate,
        "build": _build,
        bench_command.NAME: bench_command.run,
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
        "which train and eval read like a manifest (data.source=FOLDER). Clips with start and end "
        "are cut. Captions, labels, questions and sound are kept. To make reading cheaper, encode "
        "the videos anew with keyframes close together, or store sampled frames alone.",
        epilog="examples: iv2 data build clips.jsonl packed --short-side 256 --keyframe-interval "
        "16; iv2 data build clips.jsonl crops --frames 8 --crop 224",
    )
    parser.add_argument("manifest")
    parser.add_argument("folder", help="folder to make")
    _add_list_options(parser)
    parser.add_argument("--split", help="only this split")
    parser.add_argument("--name", default="clips", help="name of the data set (default: clips)")
    parser.add_argument(
        "--short-side",
        type=int,
        help="encode anew (or store frames) with the short side at most this",
    )
    parser.add_argument(
        "--keyframe-interval",
        "--gop",
        dest="gop",
        type=int,
        help="encode anew, a keyframe every so many frames",
    )
    parser.add_argument(
        "--frames",
        type=int,
        help="store so many sampled frames of each video as JPEG pictures, and no video",
    )
    parser.add_argument(
        "--sampling",
        default="middle",
        help="rule that picks those frames, in its evaluation form (default: middle)",
    )
    parser.add_argument(
        "--crop",
        type=int,
        help="store the square of this side that data.augment=center shows, and no whole frames",
    )
    parser.add_argument("--quality", type=int, default=90, help="of the pictures (default: 90)")
    parser.add_argument("--no-audio", action="store_true", help="drop sound of such videos")
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
        bench_command.write_json(args.json, found)
    return 1 if report.problems else 0


def _build(args: argparse.Namespace) -> int:
    """`iv2 data build`."""
    from tqdm import tqdm

    from iv2_jax.data import manifest
    from iv2_jax.data.builders import packed
    from iv2_jax.data.builders.frames import FrameOptions

    clips = manifest.read_clips(
        args.manifest,
        format=args.format,
        prefix=args.prefix,
        split=args.split,
        separator=args.separator,
    )
    frames = None
    if args.frames is not None:
        frames = FrameOptions(
            args.frames,
            sampling=args.sampling,
            crop=args.crop,
            short_side=args.short_side,
            quality=args.quality,
        )
    elif args.crop is not None:
        raise ConfigError("--crop is for stored frames: give their number with --frames")
    options = packed.PackOptions(
        name=args.name,
        shard_bytes=args.shard_mib << 20,
        short_side=None if frames else args.short_side,
        gop=args.gop,
        frames=frames,
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
