"""`iv2 data convert-dialogues`: files of conversations from one format into another."""

from __future__ import annotations

import argparse
import os
import sys

NAME = "convert-dialogues"


def add_command(commands: argparse._SubParsersAction) -> None:
    """Arguments of `convert-dialogues`."""
    parser = commands.add_parser(
        NAME,
        help="write conversations in another format",
        description="Reads conversations (VideoChat2-IT, LLaVA style or ours; told by content) "
        "and writes them in another format, paths as they are. What the format cannot say is an "
        "error that names the record; nothing is dropped.",
        epilog="example: iv2 data convert-dialogues train.json train_llava.json --to llava",
    )
    parser.add_argument("source", help="file to read")
    parser.add_argument("target", help="file to write")
    parser.add_argument("--to", required=True, help="videochat, llava or ours")
    parser.add_argument("--format", default="auto", help="of the source (default: told by content)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out records with mistakes, and name them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the target")


def run(args: argparse.Namespace) -> int:
    """Runs `convert-dialogues`."""
    from iv2_jax.data.instruct import formats
    from iv2_jax.data.records import FieldError
    from iv2_jax.errors import ConfigError, DataError, nearest

    if args.to not in formats.FORMATS:
        raise ConfigError(f"--to {args.to!r} is not known{nearest(args.to, formats.FORMATS)}")
    if os.path.exists(args.target) and not args.overwrite:
        raise ConfigError(f"{args.target} is there already; --overwrite replaces it")
    kept, bad = [], []
    for found in formats.iter_conversations(args.source, format=args.format):
        if not isinstance(found, formats.Problem):
            record, line, conversation = found
            try:
                formats.to_record(conversation, args.to)
                kept.append(conversation)
                continue
            except FieldError as e:
                found = formats.Problem(args.source, record, line, e.field, e.message)
        if not args.skip_bad:
            raise DataError(f"{found} (--skip-bad leaves such records out)")
        bad.append(found)
    for problem in bad:
        print(problem, file=sys.stderr)
    if not kept:
        raise DataError(f"{args.source}: none of {len(bad)} records can be written as {args.to}")
    formats.write(args.target, kept, format=args.to)
    count = ", ".join(f"{n} {kind}" for kind, n in formats.kinds(kept).items() if n)
    left = f"; {len(bad)} left out" if bad else ""
    print(f"{args.target}: {len(kept)} conversations ({count}) as {args.to}{left}")
    return 0
