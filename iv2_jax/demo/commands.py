"""`iv2 demo`."""

from __future__ import annotations

import argparse

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("--out", default="runs/demo", help="folder of everything it writes")
    parser.add_argument(
        "--data", help="your own clips: a JSONL manifest, or a JSON list with files and splits"
    )
    parser.add_argument(
        "--config", help="another stage-1 config (default: configs/demo/stage1.py of this clone)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="students to train and compare")
    parser.epilog = """\
examples:
  iv2 demo
  iv2 demo --data clips.jsonl --out runs/mine
  iv2 demo --seeds 1 --config.steps=40
"""


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns 0 when every part of it worked."""
    from pathlib import Path

    from iv2_jax.demo import run as demo

    summary = demo.run(
        Path(args.out),
        data=args.data,
        config=args.config,
        seeds=args.seeds,
        overrides=args.overrides,
    )
    print(demo.closing_lines(summary, Path(args.out)))
    return 0
