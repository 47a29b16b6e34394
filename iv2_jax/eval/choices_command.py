"""`iv2 eval --task choices` and `--task answers`: chat models asked about clips."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

CHAT = ("choices", "answers")

# Arguments of these tasks, with the tasks they belong to.
BELONGS: dict[str, tuple[str, ...]] = {
    "videos": CHAT,
    "answers": CHAT,
    "skip_missing": CHAT,
    "max_new_tokens": CHAT,
    "protocol": CHAT,
    "clip_statistics": CHAT,
    "frames": CHAT,
    "tiles": CHAT,
    "tasks": ("choices",),
    "by": ("choices",),
    "by_length": ("choices",),
    "prompt": ("choices",),
    "parser": ("choices",),
    "swap": ("choices",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of both tasks."""
    group = parser.add_argument_group("choices, answers")
    group.add_argument("--videos", help="folder of the clips (default: that of --data)")
    group.add_argument(
        "--answers", metavar="FOLDER", help="keep every answer; a killed run goes on from there"
    )
    group.add_argument(
        "--skip-missing", action="store_true", help="leave out questions whose clips are missing"
    )
    group.add_argument("--max-new-tokens", type=int, help="of a reply (default: 100)")
    group.add_argument(
        "--protocol",
        choices=("run", "mvbench"),
        help="which frames are seen (default: the benchmark's for its own tasks, else the run's)",
    )
    group.add_argument("--frames", type=int, help="of a video (default: the run's)")
    group.add_argument(
        "--tiles", type=int, help="most tiles of a clip, as HD models see it; 0 for none"
    )
    group.add_argument(
        "--clip-statistics", action="store_true", help="normalise pixels as CLIP does"
    )

    group = parser.add_argument_group("choices")
    group.add_argument("--tasks", nargs="*", help="only these task files of a folder")
    group.add_argument(
        "--by",
        choices=("generate", "likelihood"),
        help="parse a written reply (default), or take the likeliest option",
    )
    group.add_argument(
        "--by-length", action="store_true", help="divide likelihoods by the options' tokens"
    )
    group.add_argument(
        "--prompt", help="how questions are put: mvbench (default), egoschema, options, open"
    )
    group.add_argument(
        "--parser",
        choices=("strict", "released"),
        help="of replies; released counts empty ones as right (default: strict)",
    )
    group.add_argument(
        "--swap", action="store_true", help="also ask about other clips, and test the difference"
    )


def run_choices(args: argparse.Namespace, mesh: Any) -> dict[str, Any]:
    """Asks every checkpoint, prints its table; gives all figures."""
    import numpy as np

    from iv2_jax.errors import ConfigError
    from iv2_jax.eval import choices
    from iv2_jax.eval.answers import swapped
    from iv2_jax.eval.choices_data import read_choices

    if args.data is None:
        raise ConfigError("--task choices needs --data, a folder of task files or one file")
    found = read_choices(args.data, args.videos or "", tasks=args.tasks or (), missing=_gone(args))
    for name, path in found.missing.items():
        print(f"left out: {name}: {path} is not there")
    protocol = args.protocol or ("mvbench" if found.is_mvbench else "run")
    options = choices.ChoiceOptions(
        by=args.by or "generate",
        prompt=args.prompt or "mvbench",
        parser=args.parser or "strict",
        by_length=args.by_length,
        protocol=protocol,
        statistics="clip" if args.clip_statistics else "model",
        batch_size=args.batch_size,
        **_given(args, "max_new_tokens"),
    )
    rows = []
    for chat in _models(args):
        questions = found.questions
        kept = _file(args, chat.name, "choices")
        result = choices.evaluate_choices(chat, questions, options, answers=kept, mesh=mesh)
        print(choices.table(chat.name, result))
        row = {"name": chat.name, "talk": _plain(chat.talk), **result.to_json()}
        if args.swap:
            others = swapped(questions, np.random.default_rng(0))
            kept = _file(args, chat.name, "choices-swapped")
            control = choices.evaluate_choices(chat, others, options, answers=kept, mesh=mesh)
            print(choices.table(f"{chat.name}, other clips", control))
            tests = result.compare(control)
            for name, test in tests.items():
                print(f"  own clip against another, {name}: {test}")
            row["swapped"] = control.to_json()
            row["own_against_swapped"] = {n: dataclasses.asdict(t) for n, t in tests.items()}
        rows.append(row)
    return {"task": "choices", "missing": found.missing, "rows": rows}


def run_answers(args: argparse.Namespace, mesh: Any) -> dict[str, Any]:
    """Answers the questions with every checkpoint, prints shares; gives all figures."""
    from iv2_jax.errors import ConfigError
    from iv2_jax.eval import answers_open

    if args.data is None:
        raise ConfigError("--task answers needs --data, a conversation file")
    questions, passed = answers_open.read_open(
        args.data, args.videos, format=args.format or "auto", missing=_gone(args)
    )
    if passed:
        print(f"passed over: {passed} turns that cannot be asked alone")
    options = answers_open.AnswerOptions(
        protocol=args.protocol or "run",
        statistics="clip" if args.clip_statistics else "model",
        batch_size=args.batch_size,
        **_given(args, "max_new_tokens"),
    )
    rows = []
    for chat in _models(args):
        records = answers_open.evaluate_answers(
            chat, questions, options, answers=_file(args, chat.name, "answers"), mesh=mesh
        )
        shares = answers_open.summary(records)
        for record in records:
            if record.get("reason"):
                print(f"left out: {record['id']}: {record['reason']}")
        print(
            f"{chat.name}: {shares['questions']} questions, {shares['left_out']} left out"
            + "".join(
                f"; {name} {100 * value['share']:.1f} % "
                f"[{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
                for name, value in shares.items()
                if isinstance(value, dict)
            )
        )
        rows.append({"name": chat.name, "talk": _plain(chat.talk), **shares, "answers": records})
    return {"task": "answers", "passed_over": passed, "rows": rows}


def _models(args: argparse.Namespace) -> Any:
    """Opens one checkpoint after the other."""
    from iv2_jax.errors import ConfigError
    from iv2_jax.eval.chat_runs import open_chat, with_views

    template = args.template or []
    if len(template) > 1:
        raise ConfigError("--template of a chat model is one name, such as mistral_v3")
    for path in args.ckpt:
        chat = open_chat(
            path, tokenizer=args.tokenizer or "", template="".join(template), ema=args.ema
        )
        yield with_views(chat, frames=args.frames, tiles=args.tiles)


def _file(args: argparse.Namespace, name: str, what: str) -> Path | None:
    """Where a checkpoint's answers are kept."""
    if not args.answers:
        return None
    plain = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_.") or "model"
    return Path(args.answers) / f"{plain}-{what}.jsonl"


def _gone(args: argparse.Namespace) -> str:
    """What becomes of questions whose clips are missing."""
    return "skip" if args.skip_missing else "error"


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The arguments that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _plain(value: Any) -> Any:
    """A config as JSON values."""
    from iv2_jax import config as config_lib

    return json.loads(json.dumps(config_lib.to_dict(value)))
