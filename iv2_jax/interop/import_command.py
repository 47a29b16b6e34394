"""`iv2 import`: PyTorch weights as a checkpoint."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help=".safetensors, .pt, .pth or .bin file, or a folder that `iv2 export` wrote",
    )
    parser.add_argument("--model", help="name of the model in the zoo; not needed for a folder")
    parser.add_argument("--out", required=True, help="workdir to make; holds the checkpoint")
    parser.add_argument(
        "--wrapper", help="key the weights stand under, if not at the top, `module` or `model`"
    )
    parser.add_argument("--prefix", default="", help="take only keys that start so, without it")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="REGEX",
        help="leave out unexpected keys like this; may be repeated",
    )
    parser.epilog = """\
examples:
  iv2 import --from 1B_pt.pth --model internvideo2_1b_pretrain --out runs/1b
  iv2 import --from stage2.pt --prefix vision_encoder. --model internvideo2_1b --out runs/1b_s2
  iv2 import --from exported/ --out runs/again

Every key and shape must fit. The name of a bare encoder leaves out alignment heads and classifier,
and says so.
"""


def run(args: argparse.Namespace) -> int:
    """Writes the checkpoint; returns 0."""
    from pathlib import Path

    import jax

    from iv2_jax.errors import ConfigError
    from iv2_jax.interop import export, load, torch_keys
    from iv2_jax.models.student import StudentConfig

    path = Path(args.source)
    if path.is_dir():
        if args.model:
            raise ConfigError("--model is not needed: the exported folder says what it holds")
        config, path = export.read_config(path), export.weights_file(path)
    elif args.model:
        from iv2_jax.models import zoo

        config = zoo.get(args.model)
    else:
        raise ConfigError("--model must name the model that the file holds")
    ignore = dict.fromkeys(args.ignore, "left out by --ignore")
    bare = not isinstance(config, StudentConfig)
    params = load.load_params(
        path,
        export.model_entries(config),
        ignore=ignore | (torch_keys.HEADS if bare else {}),
        prefix=args.prefix,
        wrapper=args.wrapper,
    )
    if bare:
        params = {"encoder": params}
        config = StudentConfig(config, clip=None, mae=None, final_width=0, final_decoder="linear")
    folder = load.save_checkpoint(params, config, args.out, source=str(args.source))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"read {count:,} parameters from {path}; wrote a checkpoint of step 0 to {folder}")
    return 0
