"""`iv2 import`: PyTorch weights as a checkpoint."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help=".safetensors, .pt, .pth, .bin or .gguf file, sharded index (*.index.json), folder "
        "with shards or a DeepSpeed checkpoint, or folder that `iv2 export` wrote",
    )
    parser.add_argument(
        "--model",
        help="name of the model (`iv2 zoo` lists them); not for an exported one, nor for a "
        "language model in a GGUF file or in a folder with its config.json",
    )
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
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "file"),
        default="float32",
        help="of the parameters; `file` keeps each tensor's own",
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="take weights with NaNs or infinities"
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        help="of a chat model: folder, .gguf file or package:NAME/FILE; `iv2 chat` then finds it",
    )
    parser.add_argument(
        "--template", default="", help="of its chat (default: the released models' own)"
    )
    parser.epilog = """\
examples:
  iv2 import --from 1B_pt.pth --model internvideo2_1b_pretrain --out runs/1b
  iv2 import --from stage2.pt --prefix vision_encoder. --model internvideo2_1b --out runs/1b_s2
  iv2 import --from Chat-8B/ --model internvideo2_chat_8b --tokenizer Chat-8B/ --out runs/chat
  iv2 import --from exported/ --out runs/again
  iv2 import --from Mistral-7B-Instruct-v0.3/ --dtype bfloat16 --out runs/mistral
  iv2 import --from SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2

Every key and shape must fit; else the misfits are listed, with what the file seems to be, and
nothing is written. The name of a bare encoder leaves out alignment heads and classifier, and says
so. Tensors are read one at a time, so memory stays far below the size of the model.
"""


def run(args: argparse.Namespace) -> int:
    """Writes the checkpoint; returns 0."""
    from iv2_jax.interop import importing

    options = importing.ImportOptions(
        wrapper=args.wrapper,
        prefix=args.prefix,
        ignore=args.ignore,
        dtype=args.dtype,
        allow_nonfinite=args.allow_nonfinite,
        tokenizer=args.tokenizer,
        template=args.template,
    )
    count = importing.import_model(args.source, args.model, args.out, options)
    print(
        f"read {count:,} parameters from {args.source}; wrote a checkpoint of step 0 to {args.out}"
    )
    return 0
