"""`iv2 chat`: questions about a clip, in the terminal or on a local web page."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from iv2_jax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "video",
        nargs="*",
        metavar="VIDEO",
        help="video, picture or folder of pictures; with --serve clips, or a folder of them, to "
        "pick from",
    )
    parser.add_argument(
        "--ckpt", required=True, help="run of stage `instruct`, or what `iv2 import` made"
    )
    parser.add_argument(
        "--question",
        action="append",
        default=[],
        metavar="TEXT",
        help="answer this and exit; may be repeated, later ones know the earlier",
    )
    group = parser.add_argument_group("answers")
    group.add_argument("--max-tokens", type=int, default=200, help="of an answer (default: 200)")
    group.add_argument(
        "--temperature", type=float, help="draw tokens; 0 takes the likeliest (default: 0)"
    )
    group.add_argument(
        "--top-p", type=float, help="draw among the likeliest that reach P together (default: 0.9)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    group = parser.add_argument_group("model")
    group.add_argument("--frames", type=int, help="frames of a video (default: as trained)")
    group.add_argument("--tiles", type=int, help="most tiles beside the whole picture; 0 for none")
    group.add_argument("--system", metavar="TEXT", help="instruction (default: as trained)")
    group.add_argument("--context", type=int, help="tokens of prompt and answer (default: most)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and products")
    group.add_argument("--ema", action="store_true", help="moving averages of the weights")
    group.add_argument(
        "--tokenizer", default="", help="file, folder or package:NAME/FILE (default: the run's)"
    )
    group.add_argument("--template", default="", help="of the chat (default: the run's)")
    group = parser.add_argument_group("web page")
    group.add_argument("--serve", action="store_true", help="serve a page; needs iv2_jax[chat]")
    group.add_argument("--port", type=int, default=7860, help="0 for any free (default: 7860)")
    group.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    parser.epilog = """\
examples:
  iv2 chat clip.mp4 --ckpt runs/instruct
  iv2 chat clip.mp4 --ckpt runs/instruct --question "What happens?" --question "Why?"
  iv2 chat clip.mp4 --ckpt runs/instruct --top-p 0.9 --seed 7
  iv2 chat clip.mp4 --ckpt runs/chat8b --tokenizer mistral/ --template mistral_v3
  iv2 chat clips/ --ckpt runs/instruct --serve

In the terminal: /clip PATH, /clear, /help, /quit; Ctrl-C stops an answer, Ctrl-D leaves. Answers go
to the output, everything else to the error output.
"""


def run(args: argparse.Namespace) -> int:
    """Talks; returns 0."""
    from iv2_jax.talk.model import AnswerOptions, open_model
    from iv2_jax.talk.terminal import progress

    if not args.verbose:  # which attention runs is said to nobody who talks
        logging.getLogger("iv2_jax.kernels").setLevel(logging.WARNING)
    options = AnswerOptions(
        max_tokens=args.max_tokens,
        temperature=_temperature(args),
        top_p=0.9 if args.top_p is None else args.top_p,
        seed=args.seed,
    )
    if args.serve:
        if args.question:
            raise ConfigError("--question is for the terminal, not for --serve")
        from iv2_jax.talk import serving  # which says so where Gradio is missing
    elif len(args.video) > 1:
        raise ConfigError(
            f"{len(args.video)} clips: the terminal takes one (--serve takes several)"
        )
    with progress(f"reading {args.ckpt}", sys.stderr):
        model = open_model(
            args.ckpt,
            tokenizer=args.tokenizer,
            template=args.template,
            ema=args.ema,
            frames=args.frames,
            tiles=args.tiles,
            instruction=args.system,
            context=args.context,
            dtype=args.dtype,
            devices=_devices(),
        )
    if args.serve:
        serving.serve(model, options, args.video, host=args.host, port=args.port)
        return 0
    return _in_terminal(args, model, options)


def _devices() -> list[Any]:
    """This machine's; weights that one of them cannot hold are split over all."""
    import jax

    return jax.local_devices()


def _in_terminal(args: argparse.Namespace, model: object, options: object) -> int:
    """Answers the questions given, or those that are typed."""
    from iv2_jax.talk.session import ChatSession
    from iv2_jax.talk.terminal import Terminal, ask_all

    terminal = Terminal(ChatSession(model, options))
    if args.video:
        terminal.show(args.video[0])
    if args.question:
        ask_all(terminal, args.question)
    else:
        terminal.run()
    return 0


def _temperature(args: argparse.Namespace) -> float:
    """The one given; --top-p alone draws too."""
    if args.temperature is not None:
        return args.temperature
    return 0.0 if args.top_p is None else 1.0
