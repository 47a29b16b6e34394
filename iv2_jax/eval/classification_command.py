"""`iv2 eval --task classification`: fine-tuned classifiers on held-out clips."""

from __future__ import annotations

import argparse
from typing import Any

CLASSIFICATION = ("classification",)

# Arguments of this task.
BELONGS: dict[str, tuple[str, ...]] = {
    "views": CLASSIFICATION,
    "crops": CLASSIFICATION,
    "classes": CLASSIFICATION,
    "by_class": CLASSIFICATION,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the task's own arguments."""
    group = parser.add_argument_group("classification")
    group.add_argument("--views", type=int, help="temporal views of a clip (default: the run's)")
    group.add_argument("--crops", type=int, help="crops of each view (default: the run's)")
    group.add_argument("--classes", metavar="FILE", help="a class name a line, in their order")
    group.add_argument("--by-class", action="store_true", help="also a line for every class")


def run_classification(args: argparse.Namespace, mesh: Any) -> dict[str, Any]:
    """Prints a line for every checkpoint; returns what `--out` writes."""
    from iv2_jax.data.corpora import open_data
    from iv2_jax.errors import ConfigError
    from iv2_jax.eval import classification

    rows = []
    for path in args.ckpt:
        model = classification.load_classifier(path, ema=bool(args.ema))
        data = classification.evaluation_set(
            model,
            source=args.data,
            format=args.format or "auto",
            prefix=args.prefix or "",
            split=args.split,
            views=args.views,
            crops=args.crops,
        )
        if len(args.label or ()) > 1:
            raise ConfigError("--task classification takes one --label")
        label = args.label[0] if args.label else (model.run.label if model.run else "label")
        given = _read_names(args.classes) if args.classes else ()
        names = classification.names_of(model, open_data(data).clips, label, given)
        result = classification.evaluate_classifier(
            model.params, model.config, data, label, mesh, names=names, batch_size=args.batch_size
        )
        print(classification.line(path, data, result))
        if args.by_class:
            for name, figures in result.by_class().items():
                print(f"  {figures['top1']:5.1f} of {figures['clips']:4d}  {name}")
        about = {"name": path, "source": data.source, "split": data.split}
        rows.append(about | {"views": data.views, "crops": data.crops} | result.to_json())
    return {"task": args.task, "rows": rows}


def _read_names(path: str) -> tuple[str, ...]:
    """Class names of a file."""
    from pathlib import Path

    from iv2_jax.errors import DataError

    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"--classes {path}: {error.strerror or error}") from None
    return tuple(name.strip() for name in lines if name.strip())
