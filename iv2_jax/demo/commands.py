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
    parser.add_argument(
        "--stages",
        type=int,
        choices=(1, 2, 3),
        default=3,
        help="1 stops after the students, 2 after sound and text (default: 3)",
    )
    parser.add_argument(
        "--config2", help="another stage-2 config (default: configs/demo/stage2.py of this clone)"
    )
    parser.add_argument(
        "--stage2", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of that config"
    )
    parser.add_argument(
        "--config3", help="another stage-3 config (default: configs/demo/stage3.py of this clone)"
    )
    parser.add_argument(
        "--stage3", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of that config"
    )
    parser.epilog = """\
examples:
  iv2 demo
  iv2 demo --data clips.jsonl --out runs/mine
  iv2 demo --stages 1
  iv2 demo --seeds 1 --config.steps=40 --stage2 steps=10 batch_size=16 --stage3 steps=10
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
        stages=args.stages,
        stage2_config=args.config2,
        stage2_overrides=args.stage2,
        stage3_config=args.config3,
        stage3_overrides=args.stage3,
    )
    print(demo.closing_lines(summary, Path(args.out)))
    return 0
