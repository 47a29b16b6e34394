"""The report's part on stage 3."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from iv2_jax.demo import answers, dialogues, pictures

TEMPLATE = Path(__file__).with_name("report_stage3.html")


def section(out: Path, summary: Mapping[str, Any], run: Path | None) -> str:
    """HTML of the part; empty if the demo stopped before stage 3.

    Args:
      out: The demo's folder, with what `answers.talk` wrote.
      summary: The numbers.
      run: Workdir of stage 3, or None.
    """
    if run is None:
        return ""
    found = summary["answers"]
    config = json.loads((run / "config.json").read_text())
    records = json.loads((out / "answers.json").read_text())["rows"][0]["answers"]
    clips = by_clip(records)
    numbers = {
        f"all_{name}": f"{found['all'][name]:.3f}"
        for name in ("own", "other", "difference", "low", "high")
    }
    likelihood = {
        f"ll_{name}": f"{found['log_likelihood'][name]:+.2f}"
        for name in ("difference", "low", "high")
    }
    return Template(TEMPLATE.read_text()).substitute(
        **numbers,
        **likelihood,
        all_p=f"{found['all']['p']:.2g}",
        trained=html.escape(what_was_trained(config)),
        curve=pictures.loss_curves([run]),
        questions=found["all"]["questions"],
        chart=pictures.answer_intervals(found["tasks"]),
        table=answer_table(found["tasks"]),
        verdict=verdict(found),
        shown=len(clips),
        transcripts="".join(transcript(clip, strip(clip, run)) for clip in clips),
        chat=html.escape(answers.chat_command(out, run)),
    )


def what_was_trained(config: Mapping[str, Any]) -> str:
    """Model and training in some sentences."""
    chat, rows = config["chat"], config["rows"]
    decoder, bridge = chat["llm"]["decoder"], chat["bridge"]
    lora = decoder["lora"]
    adapters = f"; adapters of rank {lora['rank']} in it learn" if lora else ""
    sources = "; ".join(f"{init['tower']} from {init['path']}" for init in config["init"])
    length = max(rows["lengths"])
    return (
        f"A language model of {decoder['depth']} layers of {decoder['width']} reads "
        f"{bridge['num_queries'] + bridge['num_extra_queries']} visual tokens a clip, which a "
        f"Q-Former of {bridge['depth']} layers of {bridge['width']} makes of the video encoder's. "
        f"{sources}. Encoder and language model are frozen, the Q-Former learns{adapters}. "
        f"{config['steps']} steps of {config['batch_size']} rows of {length} positions, packed "
        "with conversations about training clips."
    )


def answer_table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Figures of each kind of question."""
    heads = ("", "questions", "chance", "own clip", "another's", "difference", "95 % interval", "p")
    rows = []
    for task, figures in tasks.items():
        cells = (
            html.escape(task),
            figures["questions"],
            f"{figures['chance']:.2f}",
            f"<b>{figures['own']:.2f}</b>",
            f"{figures['other']:.2f}",
            f"{figures['difference']:+.2f}",
            f"{figures['low']:+.2f} to {figures['high']:+.2f}",
            f"{figures['p']:.2g}",
        )
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f"<table class=numbers><tr>{head}</tr>{''.join(rows)}</table>"


def verdict(found: Mapping[str, Any]) -> str:
    """What the intervals allow to say, kind by kind."""

    def names(tasks: Sequence[str]) -> str:
        return html.escape("; ".join(tasks)) or "none"

    clear = [task for task, figures in found["tasks"].items() if figures["low"] > 0]
    rest = [task for task in found["tasks"] if task not in clear]
    all_clear = found["all"]["low"] > 0
    start = (
        "Its answers depend on the clip it is shown."
        if all_clear
        else "Over all questions this run does not show that its answers depend on the clip."
    )
    return (
        f"{start} Kinds whose interval is above 0: {names(clear)}. Kinds for which this run shows "
        f"no difference: {names(rest)}."
    )


def by_clip(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The answers of each clip, from the clip with the most right ones to that with the fewest."""
    clips: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if not record.get("reason"):
            clips.setdefault(json.dumps(record["clip"]), []).append(record)

    def wrong(clip: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
        """Share of wrong answers; among equals, of those without the right words."""
        return tuple(-sum(r[name] for r in clip) / len(clip) for name in ("exact", "contains"))

    return sorted(clips.values(), key=wrong)


def strip(clip: Sequence[Mapping[str, Any]], run: Path) -> str:
    """JPEG of the frames that the model saw of a clip."""
    from iv2_jax import config as config_lib
    from iv2_jax.data.instruct.conversations import Medium
    from iv2_jax.data.instruct.talk import TalkConfig
    from iv2_jax.eval.answers_pixels import ClipViews

    values = json.loads((run / "config.json").read_text())["talk"]
    talk = config_lib.build(TalkConfig, values, "config.talk")
    views = ClipViews(talk).load(Medium(**clip[0]["clip"]))
    return pictures.frame_strip(views[0])


def transcript(clip: Sequence[Mapping[str, Any]], picture: str) -> str:
    """Questions and answers below the clip's frames."""
    lines = []
    for record in clip:
        reply = html.escape(record["reply"].strip() or "(nothing)")
        mark = "&#10003;" if record["exact"] else "&#10007;"
        if record["question"] in dialogues.DESCRIBE:
            mark = ""  # nobody says a whole sentence word for word
        right = "" if record["exact"] else f" <i>{html.escape(record['answer'])}</i>"
        lines.append(
            f"<dt>{html.escape(record['question'])}</dt><dd>{reply} <b>{mark}</b>{right}</dd>"
        )
    return (
        f"<div class=transcript><img src='{picture}' alt='frames'><dl>{''.join(lines)}</dl></div>"
    )
