"""The report's part on stage 2."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from iv2_jax.demo import pictures

TEMPLATE = Path(__file__).with_name("report_stage2.html")
# Kind of figure -> what the report calls it.
KINDS = {
    "stage2": "stage 2",
    "frozen_stage1": "frozen student of stage 1, linear map",
    "frozen_random": "frozen random encoder, linear map",
    "before": "before stage 2",
    "chance": "chance",
}


def section(out: Path, summary: Mapping[str, Any], runs: Sequence[Path]) -> str:
    """HTML of the part; empty if the demo stopped after stage 1.

    Args:
      out: The demo's folder, with the sheet of `iv2 eval --task retrieval`.
      summary: The numbers.
      runs: Workdirs of stage 2, or none.
    """
    if not runs:
        return ""
    found = summary["retrieval"]
    config = json.loads((runs[0] / "config.json").read_text())
    return Template(TEMPLATE.read_text()).substitute(
        trained=html.escape(_what_was_trained(config)),
        curves=pictures.align_curves(runs),
        texts=found["texts"],
        clips=found["clips"],
        bars=pictures.recall_bars(found, KINDS),
        recalls=recall_table(found),
        sheet=base64.b64encode((out / "retrieval.jpg").read_bytes()).decode(),
        sounds=sound_table(summary["sound_swap"]),
    )


def _what_was_trained(config: Mapping[str, Any]) -> str:
    """One sentence each on towers and terms."""
    weights = {k: v for k, v in config["loss"]["weights"].items() if v}
    terms = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    sources = "; ".join(f"{init['tower']} from {init['path']}" for init in config["init"])
    return (
        f"{config['steps']} steps of {config['batch_size']} clips with their sound and a caption. "
        f"Loss terms and weights: {terms}. Towers of the first seed: {sources}. Frozen: "
        f"{', '.join(config['optimizer']['freeze']) or 'nothing'}."
    )


def recall_table(found: Mapping[str, Any]) -> str:
    """Recalls of both directions, mean over seeds, and the seeds of text to video R@5."""
    heads = ("", "text to video R@1", "R@5", "video to text R@1", "R@5", "R@5 by seed")
    rows = []
    for kind, title in KINDS.items():
        values = found[kind]
        cells = "".join(
            f"<td>{np.mean(values[f'{way}_r{k}']):.3f}</td>"
            for way in ("t2v", "v2t")
            for k in (1, 5)
        )
        seeds = " ".join(f"{v:.3f}" for v in values["t2v_r5"]) if kind != "chance" else ""
        css = "" if kind == "stage2" else " class=random"
        rows.append(f"<tr{css}><td>{title}</td>{cells}<td class=seeds>{seeds}</td></tr>")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f"<table class=numbers><tr>{head}</tr>{''.join(rows)}</table>"


def sound_table(swap: Mapping[str, Any]) -> str:
    """Losses with own and swapped sound, before and after training."""
    if not swap["trained"]:
        return "<p>Fewer than two held-out clips have sound: not measured.</p>"
    rows = []
    for kind, title in (("before", "before stage 2"), ("trained", "after")):
        for seed, run in enumerate(swap[kind]):
            cells = "".join(
                f"<td>{run[name]:.3f}</td>"
                for name in ("own", "swapped", "atc_own", "atc_swapped", "worse")
            )
            rows.append(f"<tr><td>{title}, seed {seed}</td>{cells}</tr>")
    heads = ("", "AVTC, own sound", "another's", "ATC, own sound", "another's", "worse")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return (
        f"<p>The {swap['trained'][0]['clips']} held-out clips with sound, contrasted with their "
        "captions: once with their own sound, once with another clip's. AVTC judges sound and "
        "picture joined in one vector, ATC sound alone. The last column is the share of clips "
        "whose joined vector moves away from their caption.</p>"
        f"<table class=numbers><tr>{head}</tr>{''.join(rows)}</table>"
    )
