"""`report.html`: one self-contained page about a finished demo."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from iv2_jax.demo import pictures, report_stage2, report_stage3
from iv2_jax.demo.prepare import PreparedData

QUERIES, NEIGHBOURS = 6, 5
TEMPLATE = Path(__file__).with_name("report.html")


def write(
    out: Path,
    summary: Mapping[str, Any],
    prepared: PreparedData,
    runs: Sequence[Path],
    aligned: Sequence[Path],
    talker: Path | None,
    commands: Sequence[str],
) -> Path:
    """Writes the page of a demo into `out`; returns its path.

    Args:
      out: The demo's folder, with `features.npz` and `exported/`.
      summary: The numbers.
      prepared: The clips.
      runs: Workdirs of the students.
      aligned: Workdirs of stage 2, or none.
      talker: Workdir of stage 3, or None.
      commands: What was run.
    """
    config = json.loads((runs[0] / "config.json").read_text())
    page = Template(TEMPLATE.read_text()).substitute(
        source=html.escape(prepared.source),
        tiles=_tiles(summary),
        teachers=_teachers(config),
        loss_curves=pictures.loss_curves(runs),
        term_curves=pictures.term_curves(runs[0]),
        masks=_masks(runs[0]),
        mask_text=_mask_text(config),
        probe_bars=pictures.probe_bars(summary["probes"]),
        probe_table=_probe_table(summary["probes"]),
        neighbours=_neighbours(out, prepared, runs[0]),
        stage2=report_stage2.section(out, summary, aligned),
        stage3=report_stage3.section(out, summary, talker),
        clips=_clip_table(prepared),
        parts=_parts(summary),
        commands=html.escape("\n".join(commands)),
        checkpoint=html.escape(str(runs[0] / "checkpoints")),
        exported=html.escape(str(out / "exported")),
    )
    path = out / "report.html"
    path.write_text(page)
    return path


def _tiles(summary: Mapping[str, Any]) -> str:
    """The headline numbers."""
    difference = summary["export_max_abs_diff"]
    tiles = [
        (
            f"{summary['loss_first']:.2f} → {summary['loss_last']:.2f}",
            "loss on held-out clips, before and after",
        ),
        (
            "{:.2f} <small>vs {:.2f}</small>".format(
                np.mean(summary["probe"]), np.mean(summary["probe_random"])
            ),
            f"linear probe of “{html.escape(summary['probe_label'])}”, trained vs random weights, "
            f"mean of {len(summary['probe'])} seeds",
        ),
        *_aligned_tiles(summary),
        *_talking_tiles(summary),
        (
            "unchecked" if difference is None else f"{difference:.0e}",
            "largest difference between Flax and the exported weights in PyTorch",
        ),
        (
            f"{summary['seconds'] / 60:.1f} min",
            f"until this page, {summary['peak_rss_gb']:.1f} GB at the peak",
        ),
    ]
    return "".join(
        f"<div class=tile><b>{value}</b><span>{text}</span></div>" for value, text in tiles
    )


def _aligned_tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The headline of stage 2."""
    if "retrieval" not in summary:
        return []
    found = {kind: np.mean(summary["retrieval"][kind]["t2v_r5"]) for kind in report_stage2.KINDS}
    return [
        (
            f"{found['stage2']:.2f} <small>vs {found['frozen_random']:.2f}</small>",
            f"text to video R@5 on held-out clips after stage 2, vs a random encoder; chance "
            f"{found['chance']:.2f}",
        )
    ]


def _talking_tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The headline of stage 3."""
    if "answers" not in summary:
        return []
    found = summary["answers"]["all"]
    return [
        (
            f"{found['own']:.2f} <small>vs {found['other']:.2f}</small>",
            f"questions about held-out clips answered right after stage 3, vs with another clip "
            f"shown; chance {found['chance']:.2f}",
        )
    ]


def _teachers(config: Mapping[str, Any]) -> str:
    """A plain sentence for each teacher."""
    lines = []
    for role in ("clip", "mae"):
        given = config[f"{role}_teacher"]
        if given is None:
            lines.append(f"<li>The <code>{role}</code> branch is off in this run.</li>")
            continue
        heads = config["student"][role]
        lines.append(
            f"<li><code>{role}</code> branch: <b>{html.escape(given['name'])}</b>, "
            f"{heads['width']} features a cell on a grid of "
            f"{'×'.join(map(str, heads['grid'])) if heads['grid'] else 'the student’s own'}; "
            f"{html.escape(_first_sentence(given['name']))}</li>"
        )
    return "".join(lines)


def _first_sentence(teacher: str) -> str:
    """The first sentence of a teacher's docstring: said in one place."""
    from iv2_jax.models import teachers

    text = " ".join((type(teachers.get(teacher)).__doc__ or "").split())
    return text.split(". ")[0].rstrip(".") + "."


def _mask_text(config: Mapping[str, Any]) -> str:
    mask = config["mask"]
    guide = config.get(f"{mask['guide']}_teacher") or {}
    guided = f"the saliency of {guide.get('name')}" if mask["kind"] == "attention" else "chance"
    return html.escape(
        f"{mask['ratio']:.0%} of the patches are hidden; which ones stay is drawn per "
        f"{mask['scope']}, guided by {guided}."
    )


def _masks(run: Path) -> str:
    blocks = []
    for clip in pictures.masked_frames(run):
        rows = "".join(
            f"<tr><th>{title}</th><td><img src='{clip[key]}' alt='{title}'></td></tr>"
            for key, title in (("frames", "frames"), ("guided", "guide"), ("visible", "seen"))
        )
        blocks.append(f"<table class=strips>{rows}</table>")
    return "".join(blocks)


def _probe_table(probes: Mapping[str, Any]) -> str:
    """Accuracy of every seed, trained and random, with the majority answer beside it."""
    head = "".join(
        f"<th>{t}</th>"
        for t in ("label", "classes", "clips", "majority", "weights", "linear", "10-NN", "seeds")
    )
    rows = []
    for name, p in probes.items():
        for side, text in (("", "trained"), ("_random", "random")):
            linear, knn = p[f"linear{side}"], p[f"knn{side}"]
            if not linear:
                continue
            seeds = " ".join(f"{v:.3f}" for v in linear)
            rows.append(
                f"<tr class={text}><td>{html.escape(name)}</td><td>{len(p['classes'])}</td>"
                f"<td>{p['train_clips']} + {p['test_clips']}</td><td>{p['majority']:.3f}</td>"
                f"<td>{text}</td><td><b>{np.mean(linear):.3f}</b> ± {np.std(linear):.3f}</td>"
                f"<td>{np.mean(knn):.3f}</td><td class=seeds>{seeds}</td></tr>"
            )
    return f"<table class=numbers><tr>{head}</tr>{''.join(rows)}</table>"


def _neighbours(out: Path, prepared: PreparedData, run: Path) -> str:
    """Held-out clips and their nearest training clips by the first student's features."""
    from iv2_jax.eval.knn import neighbours
    from iv2_jax.eval.runner import open_split
    from iv2_jax.train import loop

    features = np.load(out / "features.npz")
    train, test = features[f"{run}/train/mean"], features[f"{run}/test/mean"]
    queries = np.linspace(0, len(test) - 1, min(QUERIES, len(test))).astype(int)
    index, cosine = neighbours(test[queries], train, NEIGHBOURS)
    config = loop.read_config(str(run / "config.json"), {}).eval_data
    config = dataclasses.replace(config, source=str(prepared.manifest))
    sources = {split: open_split(config, split) for split in ("train", "test")}
    shown = sorted(set(index.ravel().tolist()))
    found = dict(zip(shown, pictures.thumbnails(config, sources["train"], shown), strict=True))
    asked = pictures.thumbnails(config, sources["test"], queries.tolist())
    rows = []
    for i, query in enumerate(queries):
        cells = [_figure(asked[i], sources["test"].clips[query], "query")]
        cells += [
            _figure(found[int(j)], sources["train"].clips[j], f"{c:.2f}")
            for j, c in zip(index[i], cosine[i], strict=True)
        ]
        rows.append(f"<div class=neighbours>{''.join(cells)}</div>")
    return "".join(rows)


def _figure(picture: str, clip: Any, note: str) -> str:
    text = " · ".join(str(v) for v in clip.labels.values()) or clip.id
    return (
        f"<figure><img src='{picture}' alt='{html.escape(clip.id)}'>"
        f"<figcaption><i>{note}</i> {html.escape(text)}</figcaption></figure>"
    )


def _clip_table(prepared: PreparedData) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{count}</td></tr>"
        for name, count in prepared.counts.items()
    )
    return f"<table class=numbers>{rows}</table>"


def _parts(summary: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{seconds:.0f} s</td></tr>"
        for name, seconds in summary["parts"].items()
    )
    return f"<table class=numbers>{rows}</table>"
