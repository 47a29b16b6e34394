"""`iv2 eval`: probes of encoders, classifiers, retrieval and zero-shot recognition of two-tower
models, and questions to chat models.
"""

from __future__ import annotations

import argparse
from typing import Any

from iv2_jax.eval import choices_command, classification_command
from iv2_jax.eval.choices_command import CHAT

TASKS = ("probe", "classification", "retrieval", "zero_shot", *CHAT)
_TWO_TOWERS = ("retrieval", "zero_shot")
_HELD_OUT = (*_TWO_TOWERS, "classification")

# Arguments that belong to some tasks only, with the value that means "not given".
_BELONGS: dict[str, tuple[str, ...]] = {
    "label": ("probe", "zero_shot", "classification"),
    "train_split": ("probe",),
    "test_split": ("probe",),
    "no_random": ("probe",),
    "features": ("probe",),
    "split": _HELD_OUT,
    "media": _TWO_TOWERS,
    "tokenizer": (*_TWO_TOWERS, *CHAT),
    "max_length": _TWO_TOWERS,
    "segments": _TWO_TOWERS,
    "random": _TWO_TOWERS,
    "ema": (*_HELD_OUT, *CHAT),
    "format": (*_HELD_OUT, "answers"),
    "prefix": _HELD_OUT,
    "caption": ("retrieval",),
    "paragraph": ("retrieval",),
    "rerank": ("retrieval",),
    "rerank_by": ("retrieval",),
    "mix": ("retrieval",),
    "released_ground_truth": ("retrieval",),
    "released_fill": ("retrieval",),
    "sheet": ("retrieval",),
    "sheet_rows": ("retrieval",),
    "template": ("zero_shot", *CHAT),
    **choices_command.BELONGS,
    **classification_command.BELONGS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("--task", choices=TASKS, default="probe", help="default: probe")
    parser.add_argument(
        "--ckpt", required=True, nargs="+", help="workdirs or step folders, one row each"
    )
    parser.add_argument("--data", help="manifest or packed set (default: the run's own)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", help="write the table as JSON")

    group = parser.add_argument_group("probe, zero_shot, classification")
    group.add_argument("--label", nargs="*", help="labels to probe for; the label of the classes")

    group = parser.add_argument_group("probe")
    group.add_argument("--train-split", help="default: train")
    group.add_argument("--test-split", help="default: test")
    group.add_argument("--no-random", action="store_true", help="no rows of random weights")
    group.add_argument("--features", help="write features to this .npz")

    group = parser.add_argument_group(
        "retrieval, zero_shot; some also classification, choices, answers"
    )
    group.add_argument("--split", help="of the clips; '' for all (default: the run's)")
    group.add_argument("--media", help="video, image, audio or audio_video (default: the run's)")
    group.add_argument(
        "--tokenizer",
        metavar="[KIND:]PATH",
        help="default: the run's; of a chat model without KIND (file, folder or package:NAME/FILE)",
    )
    group.add_argument("--max-length", type=int, help="token ids of a text (default: the run's)")
    group.add_argument("--segments", type=int, help="average over so many sub-clips (stage 2)")
    group.add_argument("--format", help="of --data (default: told by its content)")
    group.add_argument("--prefix", help="folder or URL that paths of --data start from")
    group.add_argument("--random", action="store_true", help="also what each run started with")
    group.add_argument("--ema", action="store_true", help="moving averages of the weights")

    group = parser.add_argument_group("retrieval")
    group.add_argument("--caption", help="which caption asks (default: the run's first)")
    group.add_argument("--paragraph", action="store_true", help="a clip's captions as one text")
    group.add_argument("--rerank", type=int, help="best candidates that are judged again")
    group.add_argument("--rerank-by", choices=("sim", "dsl"), help="what chooses them")
    group.add_argument("--mix", type=float, help="weight of cosine / temperature beside the logit")
    group.add_argument(
        "--released-ground-truth",
        action="store_true",
        help="equal texts of other clips count as wrong",
    )
    group.add_argument(
        "--released-fill", action="store_true", help="what is not judged again is one long tie"
    )
    group.add_argument("--sheet", help="write a picture of queries and what was found")
    group.add_argument("--sheet-rows", type=int, help="queries on it (default: 8)")

    group = parser.add_argument_group("zero_shot; choices, answers")
    group.add_argument(
        "--template",
        nargs="*",
        help="texts with {} for the class name; name of a chat template (default: the run's)",
    )
    choices_command.add_arguments(parser)
    classification_command.add_arguments(parser)
    parser.epilog = """\
examples:
  iv2 eval --ckpt runs/demo/seed0 runs/demo/seed1 --label action game
  iv2 eval --ckpt runs/s1 --data clips.jsonl --label topic --out probe.json
  iv2 eval --task classification --ckpt runs/ft --views 4 --crops 3 --by-class
  iv2 eval --task retrieval --ckpt runs/s2 --random --rerank 16 --sheet sheet.jpg
  iv2 eval --task retrieval --ckpt released_1b --data msrvtt_1k.json --prefix /data/msrvtt \\
      --tokenizer bert:vocab.txt --max-length 32 --rerank 128 --released-ground-truth
  iv2 eval --task zero_shot --ckpt runs/s2 --data clips.jsonl --split test --label action
  iv2 eval --task choices --ckpt runs/s3 --data MVBench/json --videos MVBench/video \\
      --answers runs/s3/mvbench --out mvbench.json
  iv2 eval --task choices --ckpt runs/s3 --data questions.json --prompt open --by likelihood --swap
  iv2 eval --task answers --ckpt runs/s3 --data test_it.json --answers runs/s3/answers
"""


def run(args: argparse.Namespace) -> int:
    """Prints the table; returns 0."""
    check(args)
    if args.task in CHAT:
        return _chat(args)
    if args.task == "classification":
        return _classification(args)
    return {"probe": _probe, "retrieval": _retrieval, "zero_shot": _zero_shot}[args.task](args)


def check(args: argparse.Namespace) -> None:
    """Refuses arguments of other tasks.

    Raises:
      ConfigError: Names the argument and the tasks it belongs to.
    """
    from iv2_jax.errors import ConfigError

    for name, tasks in _BELONGS.items():
        if getattr(args, name) not in (None, False) and args.task not in tasks:
            raise ConfigError(
                f"--{name.replace('_', '-')} belongs to --task {' and '.join(tasks)}, not to "
                f"--task {args.task}"
            )
    if args.task == "zero_shot" and len(args.label or ()) != 1:
        raise ConfigError("--task zero_shot needs one --label, whose values are the class names")
    if args.task == "retrieval" and not args.rerank:
        for name in ("rerank_by", "mix", "released_fill"):
            if getattr(args, name) not in (None, False):
                raise ConfigError(f"--{name.replace('_', '-')} needs --rerank")
    if args.sheet_rows is not None and not args.sheet:
        raise ConfigError("--sheet-rows needs --sheet")
    sizes = ("batch_size", "rerank", "segments", "sheet_rows", "max_new_tokens", "frames")
    for name in (*sizes, "views", "crops"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, is {value}")
    if args.data is None and (args.format or args.prefix):
        raise ConfigError("--format and --prefix need --data")


def _probe(args: argparse.Namespace) -> int:
    """Linear and nearest-neighbour probes."""
    import jax
    import numpy as np

    from iv2_jax.errors import ConfigError
    from iv2_jax.eval import runner
    from iv2_jax.parallel.distributed import start

    start()
    if jax.process_count() > 1:
        raise ConfigError("--task probe is for one process: run it on one host")
    result = runner.evaluate(
        args.ckpt,
        data=args.data,
        labels=args.label or None,
        splits=(args.train_split or "train", args.test_split or "test"),
        batch_size=args.batch_size,
        random=not args.no_random,
    )
    print(runner.table(result))
    _write_json(args.out, result.to_json())
    if args.features:
        np.savez(args.features, **result.feature_arrays())
    return 0


def _retrieval(args: argparse.Namespace) -> int:
    """Retrieval of every checkpoint; the sheet shows the first."""
    import jax

    from iv2_jax.eval import retrieval_runs
    from iv2_jax.eval.retrieval_task import RetrievalOptions, evaluate_retrieval
    from iv2_jax.parallel.distributed import start

    start()
    options = RetrievalOptions(
        segments=args.segments or 1,
        same_text_relevant=not args.released_ground_truth,
        rerank_by=args.rerank_by or "sim",
        mix=args.mix or 0.0,
        released_fill=args.released_fill,
    )

    def evaluate(model: Any) -> tuple[Any, Any]:
        data = _data(args, model)
        result = evaluate_retrieval(
            model.params,
            model.config,
            data,
            rerank_top=args.rerank or 0,
            batch_size=args.batch_size,
            mesh=_all_devices(),
            options=options,
        )
        return result, data

    table = retrieval_runs.evaluate_models(
        args.task, args.ckpt, evaluate, random=args.random, ema=args.ema
    )
    print(retrieval_runs.retrieval_table(table))
    _write_json(args.out, table.to_json())
    if args.sheet:
        from iv2_jax.eval.contact_sheet import retrieval_sheet

        row = table.rows[0]
        best = "match" if args.rerank else "sim"
        title = (
            f"{row.name}: text to {row.data.media}, R@1 {row.result.metrics[f'{best}/t2v_r1']:.1f}"
        )
        sheet = retrieval_sheet(row.result, row.data, rows=args.sheet_rows or 8, title=title)
        if jax.process_index() == 0:
            sheet.save(args.sheet)
    return 0


def _zero_shot(args: argparse.Namespace) -> int:
    """Recognition by class names of every checkpoint."""
    from iv2_jax.eval import retrieval_runs, zero_shot
    from iv2_jax.eval.retrieval_task import RetrievalOptions
    from iv2_jax.parallel.distributed import start

    start()

    def evaluate(model: Any) -> tuple[Any, Any]:
        data = _data(args, model)
        result = zero_shot.evaluate_zero_shot(
            model.params,
            model.config,
            data,
            args.label[0],
            templates=args.template or (),
            batch_size=args.batch_size,
            mesh=_all_devices(),
            options=RetrievalOptions(segments=args.segments or 1),
        )
        return result, data

    table = retrieval_runs.evaluate_models(
        args.task, args.ckpt, evaluate, random=args.random, ema=args.ema
    )
    print(retrieval_runs.zero_shot_table(table))
    _write_json(args.out, table.to_json())
    return 0


def _classification(args: argparse.Namespace) -> int:
    """Accuracy of classifiers."""
    from iv2_jax.parallel.distributed import start

    start()
    _write_json(args.out, classification_command.run_classification(args, _all_devices()))
    return 0


def _chat(args: argparse.Namespace) -> int:
    """Questions to chat models."""
    from iv2_jax.parallel.distributed import start

    start()  # several processes are told apart, and refused
    run_task = {
        "choices": choices_command.run_choices,
        "answers": choices_command.run_answers,
    }[args.task]
    _write_json(args.out, run_task(args, _all_devices()))
    return 0


def _data(args: argparse.Namespace, model: Any) -> Any:
    """The clips of a model's row."""
    from iv2_jax.eval import model_runs

    return model_runs.evaluation_set(
        model,
        source=args.data,
        format=args.format or "auto",
        prefix=args.prefix or "",
        split=args.split,
        media=args.media,
        tokenizer=args.tokenizer,
        max_length=args.max_length,
        captions=(args.caption,) if args.caption else (),
        join=True if args.paragraph else None,
    )


def _all_devices() -> Any:
    """A mesh of all devices; weights that one of them cannot hold are split over all."""
    from iv2_jax.parallel.mesh import MeshConfig, make_mesh

    return make_mesh(MeshConfig(data=1, fsdp=-1))


def _write_json(path: str | None, values: Any) -> None:
    """Writes the table, on one process."""
    import json
    from pathlib import Path

    import jax

    if path and jax.process_index() == 0:
        Path(path).write_text(json.dumps(values, indent=2) + "\n")
