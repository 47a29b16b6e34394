"""`iv2 export`: a checkpoint as a folder for plain PyTorch."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("--ckpt", required=True, help="workdir of a run, or a step folder")
    parser.add_argument("--to", required=True, help="folder to write")
    parser.add_argument(
        "--format",
        choices=("safetensors", "torch", "hf"),
        default="safetensors",
        help="weight file; `hf`: a folder for transformers' AutoModel, in plain PyTorch",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", help="largest weight file of --format hf; default 5GB"
    )
    parser.add_argument("--step", type=int, help="which step; default the newest")
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights")
    parser.add_argument("--encoder-only", action="store_true", help="leave the alignment heads out")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder with files")
    parser.epilog = """\
examples:
  iv2 export --ckpt runs/s1 --to exported/
  iv2 export --ckpt runs/s1 --to exported/ --format torch --encoder-only
  iv2 export --ckpt runs/s1 --to exported/ --format hf --max-shard-size 2GB

The folder's README.md shows how to load it in PyTorch.
"""


def run(args: argparse.Namespace) -> int:
    """Writes the folder; returns 0."""
    from iv2_jax.errors import ConfigError
    from iv2_jax.interop import export, run_config
    from iv2_jax.train import checkpoint

    shard_bytes = _bytes(args.max_shard_size)
    params, values = checkpoint.load_params(args.ckpt, args.step, ema=args.ema)
    config = run_config.read_run(values)
    if args.encoder_only:
        if "encoder" not in params or not hasattr(config, "encoder"):
            raise ConfigError(
                f"--encoder-only: {type(config).__name__} has no video encoder of its own"
            )
        params, config = params["encoder"], config.encoder
    folder = export.export_model(
        params,
        config,
        args.to,
        weight_format=args.format,
        source=args.ckpt,
        overwrite=args.overwrite,
        shard_bytes=shard_bytes,
    )
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")
    return 0


def _bytes(text: str) -> int:
    """Reads `5GB`, `200MB` or a number of bytes."""
    from iv2_jax.errors import ConfigError

    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
    number = text.strip().upper().rstrip("KMGB")
    unit = text.strip().upper()[len(number) :]
    if unit not in units or not number.replace(".", "", 1).isdigit():
        raise ConfigError(f"--max-shard-size {text!r}: expected a size such as 5GB or 200MB")
    size = int(float(number) * units[unit])
    if size < 1:
        raise ConfigError(f"--max-shard-size {text!r}: must be at least one byte")
    return size
