"""`iv2 eval --task retrieval` and `--task zero_shot`: checkpoints, tables and JSON."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from iv2_jax.data.pipeline import DataConfig
from iv2_jax.eval.model_runs import EvaluatedModel, as_rows, at_step_0, load_model

logger = logging.getLogger(__name__)


@dataclass
class Row:
    """One model's figures.

    Attributes:
      name: Of the model.
      trained: False for weights as a run starts with them.
      seed: Of its run.
      result: Of the task.
      data: The clips as they were read.
    """

    name: str
    trained: bool
    seed: int
    result: Any
    data: DataConfig


@dataclass
class Table:
    """Rows of one task."""

    task: str
    rows: list[Row] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything but the score matrices."""
        rows = [
            {
                "name": row.name,
                "trained": row.trained,
                "seed": row.seed,
                "source": row.data.source or [c.source for c in row.data.corpora],
                "split": row.data.split,
                "media": row.data.media,
                "metrics": as_rows(row.result.metrics),
                "left_out": getattr(row.result, "left_out", {}),
            }
            for row in self.rows
        ]
        return {"task": self.task, "rows": rows}


def evaluate_models(
    task: str,
    paths: Sequence[str],
    evaluate: Callable[[EvaluatedModel], tuple[Any, DataConfig]],
    *,
    random: bool = False,
    ema: bool = False,
) -> Table:
    """Evaluates checkpoints one after the other, one set of weights in memory at a time.

    Args:
      task: For the table.
      paths: Runs, step folders, imported checkpoints or exported folders.
      evaluate: What is done with each; gives a result and the data it was made of.
      random: Also evaluate the weights that each run started with.
      ema: The moving averages instead of the parameters.
    """
    table = Table(task)
    for path in paths:
        loaders = [lambda path=path: load_model(path, ema=ema)]
        if random:
            loaders.append(lambda path=path: at_step_0(path))
        for load in loaders:
            model = load()
            logger.info("evaluating %s", model.name)
            result, data = evaluate(model)
            table.rows.append(Row(model.name, model.trained, model.seed, result, data))
    return table


def retrieval_table(table: Table) -> str:
    """Recalls of both directions, a line for every model and kind of score, chance last."""
    head = f"{'text to media':>29}{'media to text':>29}"
    lines = [f"{'':8}{head}", f"{'':8}" + f"{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median':>8}" * 2]
    for row in table.rows:
        kinds = as_rows(row.result.metrics)
        numbers = kinds.pop("")
        lines.append(
            f"{row.name}: {numbers['clips']:.0f} clips, {numbers['texts']:.0f} texts of "
            f"{numbers['captions']:.0f} captions, {numbers['left_out']:.0f} left out"
        )
        for kind, values in kinds.items():
            cells = "".join(
                "".join(f"{values[f'{way}_r{k}']:7.1f}" for k in (1, 5, 10))
                + f"{values[f'{way}_median_rank']:8.1f}"
                for way in ("t2v", "v2t")
            )
            lines.append(f"  {kind:6}{cells}")
    return "\n".join(lines)


def zero_shot_table(table: Table) -> str:
    """Accuracies, a line for every model."""
    lines = []
    for row in table.rows:
        m = row.result.metrics
        lines.append(
            f"{row.name}: top-1 {m['top1']:.1f} (chance {m['chance/top1']:.1f}), top-5 "
            f"{m['top5']:.1f} ({m['chance/top5']:.1f}), class mean {m['class_mean']:.1f}, with "
            f"dual softmax {m['dsl/top1']:.1f}; {m['classes']:.0f} classes, "
            f"{m['clips']:.0f} clips, {m['left_out']:.0f} left out"
        )
    return "\n".join(lines)
