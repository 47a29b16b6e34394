"""`iv2 eval`: probes of checkpoints' encoders, beside the same on random weights."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--ckpt", required=True, nargs="+", help="workdirs or step folders, one row each"
    )
    parser.add_argument("--data", help="manifest or packed set (default: the run's own)")
    parser.add_argument("--label", nargs="*", help="labels to probe for (default: all that can be)")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--no-random", action="store_true", help="leave out the rows of random weights"
    )
    parser.add_argument("--out", help="write the table as JSON")
    parser.add_argument("--features", help="write features to this .npz")
    parser.epilog = """\
examples:
  iv2 eval --ckpt runs/demo/seed0 runs/demo/seed1 --label action game
  iv2 eval --ckpt runs/s1 --data clips.jsonl --label topic --out probe.json
"""


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 0."""
    import json
    from pathlib import Path

    import numpy as np

    from iv2_jax.eval import runner
    from iv2_jax.parallel.distributed import start

    start()
    result = runner.evaluate(
        args.ckpt,
        data=args.data,
        labels=args.label or None,
        splits=(args.train_split, args.test_split),
        batch_size=args.batch_size,
        random=not args.no_random,
    )
    print(runner.table(result))
    if args.out:
        Path(args.out).write_text(json.dumps(result.to_json(), indent=2) + "\n")
    if args.features:
        np.savez(args.features, **result.feature_arrays())
    return 0
