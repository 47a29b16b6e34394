"""The demo, end to end: clips, students, probes, export, sound and text, talking, report.

Every part that a user would call by hand is called here by its command line, in a process of its
own; the commands are in the report.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import iv2_jax
from iv2_jax.demo import alignment, answers, report
from iv2_jax.demo.prepare import PreparedData, prepare
from iv2_jax.errors import ConfigError, UserError
from iv2_jax.parallel import cpu
from iv2_jax.train.metrics import read_metrics

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = "configs/demo/stage1.py"
# The label whose probe is the demo's headline, the first of these that the clips have: what needs
# motion comes before what a single frame shows.
HEADLINE_LABELS = ("action", "topic", "label", "game")
CLIPS_A_CLASS = 5


class DemoError(UserError):
    """A part of the demo failed; the message names the command."""


def run(
    out: Path,
    *,
    data: str | None = None,
    config: str | None = None,
    seeds: int = 3,
    overrides: Sequence[str] = (),
    stages: int = 3,
    stage2_config: str | None = None,
    stage2_overrides: Sequence[str] = (),
    stage3_config: str | None = None,
    stage3_overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs the demo and writes `report.html` and `summary.json` into `out`.

    Args:
      out: Folder of everything it writes; runs in it that are complete are not done again.
      data: A manifest of the user's own clips; default clips from installed packages.
      config: Stage-1 config file.
      seeds: Number of students, which differ in initialisation, data order and masks.
      overrides: `--config.field=value` arguments for every student.
      stages: 1 stops after the students, 2 goes on with sound and text, 3 (the first student alone)
        with questions and answers.
      stage2_config: Stage-2 config file.
      stage2_overrides: `field=value` of that config.
      stage3_config: Stage-3 config file.
      stage3_overrides: `field=value` of that config.

    Returns:
      The summary.

    Raises:
      UserError: No usable clips, or a part failed.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds must be >= 1, not {seeds}")
    out.mkdir(parents=True, exist_ok=True)
    timeline = Timeline()
    with timeline.part("clips"):
        prepared = prepare(out / "data", data=data)
        aligns = stages > 1 and alignment.can_align(prepared)
    config = config or _default_config(DEFAULT_CONFIG)
    if aligns:
        stage2_config = stage2_config or _default_config(alignment.CONFIG)
    talks = stages > 2 and answers.can_talk(prepared)
    if talks:
        stage3_config = stage3_config or _default_config(answers.CONFIG)
    targets = out / "targets"
    fields = (
        f"--config.data.source={prepared.manifest}",
        f"--config.eval_data.source={prepared.manifest}",
        *overrides,
    )
    with timeline.part("teachers"):
        if not _made_since(targets, prepared.manifest):
            timeline.call(
                *("data", "teacher-features", "--config", config, "--out", str(targets)),
                *("--overwrite", *fields),
            )
    runs = [out / f"seed{seed}" for seed in range(seeds)]
    for seed, workdir in enumerate(runs):
        with timeline.part(f"training, seed {seed}"):
            timeline.call(
                *("train", "--config", config, "--workdir", str(workdir)),
                *fields,
                f"--config.teacher_features={targets}",
                f"--config.seed={seed}",
            )
    probe_file, feature_file = out / "probe.json", out / "features.npz"
    with timeline.part("probes"):
        timeline.call(
            *("eval", "--ckpt", *map(str, runs), "--data", str(prepared.manifest)),
            *("--out", str(probe_file), "--features", str(feature_file)),
        )
    exported = out / "exported"
    with timeline.part("export and check in PyTorch"):
        timeline.call("export", "--ckpt", str(runs[0]), "--to", str(exported), "--overwrite")
        difference = check_export(runs[0], exported)
    summary = summarise(prepared, runs, json.loads(probe_file.read_text()), difference)
    aligned: list[Path] = []
    if aligns:
        aligned = alignment.align(timeline, out, prepared, runs, stage2_config, stage2_overrides)
        with timeline.part("yardsticks and swapped sounds"):
            summary |= alignment.summarise(out, runs, aligned)
    talker = None
    if talks:
        talker = answers.talk(timeline, out, prepared, runs[0], stage3_config, stage3_overrides)
        summary |= answers.summarise(out, talker)
    with timeline.part("report"):
        summary |= timeline.totals()
        report.write(out, summary, prepared, runs, aligned, talker, timeline.commands)
    # The report shows the parts before it; the summary counts its own writing too.
    summary |= timeline.totals()
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


class Timeline:
    """Seconds of each part, the commands that ran, and the highest memory of the process tree."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.commands: list[str] = []
        self._started = time.monotonic()
        self._peak = 0
        threading.Thread(target=self._watch_memory, daemon=True).start()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is inside."""
        logger.info("== %s", name)
        start = time.monotonic()
        yield
        self.parts[name] = time.monotonic() - start

    def call(self, verb: str, *arguments: str) -> None:
        """Runs `iv2 VERB ...` as a user would.

        Raises:
          DemoError: It ended with another exit code than 0.
        """
        self.commands.append("iv2 " + " ".join(map(shlex.quote, (verb, *arguments))))
        logger.info("$ %s", self.commands[-1])
        command = [sys.executable, "-m", "iv2_jax.cli", verb, *arguments]
        code = subprocess.run(command, env={**cpu.MALLOC, **os.environ}).returncode
        if code:
            raise DemoError(f"this ended with exit code {code}: {self.commands[-1]}")

    def totals(self) -> dict[str, Any]:
        """`seconds`, `peak_rss_gb` and the seconds of each part."""
        return {
            "seconds": round(time.monotonic() - self._started, 1),
            "peak_rss_gb": round(self._peak / 2**30, 2),
            "parts": {name: round(seconds, 1) for name, seconds in self.parts.items()},
        }

    def _watch_memory(self) -> None:
        """Adds up resident memory of this process and its children (shared pages count twice)."""
        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue  # it ended between being listed and being asked
            self._peak = max(self._peak, total)
            time.sleep(0.5)


def _made_since(targets: Path, manifest: Path) -> bool:
    """Whether the teachers' outputs were written after the list of clips."""
    index = targets / "targets.json"
    return index.is_file() and index.stat().st_mtime > manifest.stat().st_mtime


def _default_config(name: str) -> str:
    """A config of the demo in this clone.

    Raises:
      ConfigError: The package was installed without its clone.
    """
    path = Path(iv2_jax.__file__).resolve().parents[1] / name
    if not path.is_file():
        raise ConfigError(f"{name} is not here; run from a clone, or pass a config of your own")
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def check_export(workdir: Path, exported: Path, clips: int = 4) -> float | None:
    """Largest difference between Flax and the exported folder in PyTorch on held-out clips.

    None, with a message, where PyTorch is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        logger.warning("PyTorch is not installed (pip install 'iv2_jax[torch]'): export unchecked")
        return None
    from iv2_jax.interop.export import verify_export
    from iv2_jax.train import checkpoint, loop

    params, _ = checkpoint.load_params(workdir)
    stage = loop.read_config(str(workdir / "config.json"), {}).make_stage()
    batch = next(iter(stage.eval_batches()))
    stride = stage.config.frame_stride
    difference = verify_export(
        exported, params, stage.config.student, batch["video"][:clips, ::stride]
    )
    logger.info("largest difference between Flax and PyTorch: %.2e", difference)
    return float(difference)


def headline(labels: Mapping[str, Mapping[str, Any]]) -> str:
    """The label that `probe` and `probe_random` of the summary are about.

    The first of `HEADLINE_LABELS` with enough training clips a class to learn from; else the one
    that has most of them.

    Args:
      labels: Label -> its `classes` and number of `train_clips`.
    """

    def clips_a_class(name: str) -> float:
        return labels[name]["train_clips"] / len(labels[name]["classes"])

    known = [n for n in HEADLINE_LABELS if n in labels and clips_a_class(n) >= CLIPS_A_CLASS]
    return known[0] if known else max(sorted(labels), key=clips_a_class)


def summarise(
    prepared: PreparedData, runs: Sequence[Path], probes: dict[str, Any], difference: float | None
) -> dict[str, Any]:
    """The numbers of the demo; see `docs/demo.md` for what each says."""
    label = headline(probes["labels"])
    losses = [[line["loss"] for line in read_metrics(run, "eval")] for run in runs]
    final = read_metrics(runs[0], "train")[-1]

    def scores(trained: bool, kind: str, name: str) -> list[float]:
        return [r[kind] for r in probes["rows"] if r["trained"] == trained and r["label"] == name]

    by_label = {
        name: about
        | {
            f"{kind}{'' if trained else '_random'}": scores(trained, kind, name)
            for kind in ("linear", "knn")
            for trained in (True, False)
        }
        for name, about in probes["labels"].items()
    }
    return {
        "loss_first": losses[0][0],
        "loss_last": losses[0][-1],
        "loss_first_seeds": [seed[0] for seed in losses],
        "loss_last_seeds": [seed[-1] for seed in losses],
        "probe_label": label,
        "probe": scores(True, "linear", label),
        "probe_random": scores(False, "linear", label),
        "probes": by_label,
        "export_max_abs_diff": difference,
        "clips_per_s": final.get("clips_per_s"),
        "data_wait": final.get("data_wait"),
        "data_source": prepared.source,
        "clips": prepared.counts,
    }


def closing_lines(summary: dict[str, Any], out: Path) -> str:
    """What the demo prints last."""

    def mean(values: Sequence[float]) -> str:
        return f"{sum(values) / len(values):.3f}"

    difference = summary["export_max_abs_diff"]
    checked = "not checked" if difference is None else f"differs by at most {difference:.1e}"
    aligned = _aligned_lines(summary) if "retrieval" in summary else []
    talking = answers.closing_lines(summary, out) if "answers" in summary else []
    return "\n".join(
        [
            f"held-out loss  {summary['loss_first']:.3f} -> {summary['loss_last']:.3f}",
            f"probe ({summary['probe_label']})  trained {mean(summary['probe'])}, random weights "
            f"{mean(summary['probe_random'])}, mean of {len(summary['probe'])} seeds",
            f"export in PyTorch  {checked}",
            *aligned,
            *talking[:1],
            f"took {summary['seconds'] / 60:.1f} min and {summary['peak_rss_gb']:.1f} GB",
            f"report: {out / 'report.html'}",
            *talking[1:],
        ]
    )


def _aligned_lines(summary: dict[str, Any]) -> list[str]:
    """What is said of stage 2."""
    found = summary["retrieval"]
    rows = [("stage 2", "stage2"), ("random encoder", "frozen_random"), ("chance", "chance")]
    recalls = ", ".join(
        f"{title} " + " / ".join(f"{np.mean(found[kind][f't2v_r{k}']):.3f}" for k in (1, 5))
        for title, kind in rows
    )
    lines = [f"text to video R@1 / R@5  {recalls}"]
    if heard := summary["sound_swap"]["trained"]:
        own, swapped = (np.mean([run[name] for run in heard]) for name in ("own", "swapped"))
        lines.append(f"AVTC loss  own sound {own:.3f}, another clip's {swapped:.3f}")
    return lines
