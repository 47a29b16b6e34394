"""`iv2 plan`."""

from __future__ import annotations

import argparse

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--config", required=True, help="FILE.py[:argument], or the config.json that a run saved"
    )
    parser.add_argument(
        "--topology", required=True, help="chip and shape of a slice: v5e:16x16, v5p:8x8x8"
    )
    parser.add_argument("--slices", type=int, default=1, help="slices of that shape (default: 1)")
    parser.add_argument("--samples", type=float, help="clips to price (default: the whole run)")
    parser.add_argument("--prices", metavar="FILE", help="price table (default: the package's)")
    parser.add_argument(
        "--search", action="store_true", help="try batch, mesh and remat; print the frontier"
    )
    parser.add_argument("--batches", type=_ints, help="with --search: global batches, 1024,2048")
    parser.add_argument("--fsdp", type=_ints, help="with --search: sizes of mesh.fsdp, 16,64")
    parser.add_argument("--remat", type=_names, help="with --search: of none,named,dots,full")
    parser.add_argument(
        "--operations", type=int, default=0, metavar="N", help="print the N heaviest operations"
    )
    parser.add_argument("--sharding", action="store_true", help="print every parameter's sharding")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--html", metavar="FILE", help="write a page with charts there")
    parser.add_argument("--markdown", metavar="FILE", help="write the report as a page there")
    parser.add_argument("--hlo", metavar="FOLDER", help="write the compiled programs' text there")
    parser.epilog = """\
compiles the real training step for TPUs that are only described; needs pip install 'iv2_jax[tpu]',
no TPU. Any field of the config is set by --config.FIELD=VALUE:
  iv2 plan --config configs/stage1/internvideo2_1b.py --topology v5e:16x16 \\
      --config.student.encoder.remat=full
  iv2 plan --config configs/stage1/internvideo2_6b.py --topology v5p:8x8x8 --slices 2 --html p.html
  iv2 plan --config configs/demo/stage1.py --topology v5e:2x2 --search --batches 64,256
exit codes: 0 it fits, 1 it does not, 2 something to mend
"""


def _ints(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


def run(args: argparse.Namespace) -> int:
    """Plans; returns 0 when the config fits."""
    import os

    # Only described devices are used: do not look for others, nor wait for them.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from iv2_jax.parallel.plan import running

    return running.run(args)
