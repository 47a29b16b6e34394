"""`iv2 VERB`: the command line. Verbs are imported only when they are called."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from iv2_jax import __version__
from iv2_jax.errors import UserError, nearest
from iv2_jax.parallel import cpu

# verb -> (module with add_arguments and run, one line of help)
VERBS = {
    "train": ("iv2_jax.train.commands", "train a stage from a config file"),
    "eval": ("iv2_jax.eval.commands", "probes, retrieval and zero-shot recognition"),
    "chat": ("iv2_jax.talk.command", "talk about a clip, in the terminal or on a web page"),
    "data": ("iv2_jax.data.commands", "build, validate and time data sets"),
    "export": ("iv2_jax.interop.export_command", "write a checkpoint in PyTorch's names"),
    "import": ("iv2_jax.interop.import_command", "read PyTorch weights into a checkpoint"),
    "assemble": ("iv2_jax.train.assemble_command", "put a run's starting weights together"),
    "zoo": ("iv2_jax.interop.zoo_command", "list the models, or one model's parameters"),
    "plan": ("iv2_jax.parallel.plan.command", "memory, speed and cost of a run on a TPU slice"),
    "demo": ("iv2_jax.demo.commands", "the whole of stage 1 on real clips, with a report"),
}
_EXIT_SECONDS = 60  # for what Python does at its end
COMPUTING = ("train", "eval", "chat")  # what is set for the CPU platform is set for these
EXAMPLES = """\
examples:
  iv2 demo --out runs/demo
  iv2 train --config configs/demo/stage1.py --workdir runs/s1 --config.steps=200
  iv2 eval --ckpt runs/s1 --data clips.jsonl --label action
  iv2 chat clip.mp4 --ckpt runs/instruct
  iv2 data validate clips.jsonl
  iv2 data build clips.jsonl packed
  iv2 export --ckpt runs/s1 --to exported/
  iv2 zoo internvideo2_1b
  iv2 plan --config configs/stage1/internvideo2_1b.py --topology v5p:4x4x8

`iv2 VERB --help` tells the rest. Exit codes: 0 done, 2 something to mend, 3 the loss is not finite,
75 stopped on request (the same command goes on).
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iv2",
        description="InternVideo2 in JAX: train, evaluate and convert video foundation models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"iv2_jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name, (_, text) in VERBS.items():
        verbs.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0].startswith("-"):
        parser = _parser()
        parser.parse_args(argv)
        parser.print_help()
        return 2
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        print(f"iv2: unknown verb {verb!r}{nearest(verb, VERBS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(VERBS[verb][0])
    parser = argparse.ArgumentParser(
        prog=f"iv2 {verb}",
        description=VERBS[verb][1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show libraries' messages too")
    module.add_arguments(parser)
    args, overrides = parser.parse_known_args(rest)
    if overrides and not getattr(module, "TAKES_OVERRIDES", False):
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    args.overrides = overrides
    _set_up_logging(args.verbose)
    if verb in COMPUTING:
        cpu.set_up()
    try:
        return module.run(args)
    except UserError as error:
        print(f"iv2 {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"iv2 {verb}: interrupted", file=sys.stderr)
        return 130


def entry() -> NoReturn:
    """The command `iv2`: runs `main` and ends with its code, in bounded time.

    At its end Python waits for all threads. One of Orbax's that waits for a write that has failed
    would hold the process, and its peers, for ten minutes.
    """
    code = main()
    timer = threading.Timer(_EXIT_SECONDS, _end_now, [code])
    timer.daemon = True
    timer.start()
    sys.exit(code)


def _end_now(code: int) -> None:
    """Ends the process although threads are left."""
    names = ", ".join(t.name for t in threading.enumerate() if not t.daemon)
    print(f"iv2: ends without waiting any longer for threads: {names}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _set_up_logging(verbose: bool) -> None:
    """Our own messages at INFO; libraries' from WARNING on, unless asked for."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    logging.getLogger("iv2_jax").setLevel(logging.INFO)
    if not verbose:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of its own layouts


if __name__ == "__main__":
    entry()
