"""`iv2 export`: a checkpoint as a folder for plain PyTorch."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("--ckpt", required=True, help="workdir of a run, or a step folder")
    parser.add_argument("--to", required=True, help="folder to write")
    parser.add_argument(
        "--format", choices=("safetensors", "torch"), default="safetensors", help="weight file"
    )
    parser.add_argument("--step", type=int, help="which step; default the newest")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument("--encoder-only", action="store_true", help="leave the alignment heads out")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder with files")
    parser.epilog = """\
examples:
  iv2 export --ckpt runs/s1 --to exported/
  iv2 export --ckpt runs/s1 --to exported/ --format torch --encoder-only

The folder's README.md shows how to load it in PyTorch.
"""


def run(args: argparse.Namespace) -> int:
    """Writes the folder; returns 0."""
    from iv2_jax.interop import export
    from iv2_jax.train import checkpoint

    params, run_config = checkpoint.load_params(args.ckpt, args.step, ema=args.ema)
    config = export.run_model_config(run_config)
    if args.encoder_only:
        params, config = params["encoder"], config.encoder
    folder = export.export_model(
        params,
        config,
        args.to,
        weight_format=args.format,
        source=args.ckpt,
        overwrite=args.overwrite,
    )
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")
    return 0
