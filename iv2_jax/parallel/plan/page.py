"""A plan as one HTML page with charts drawn as SVG; no script, nothing loaded from elsewhere."""

from __future__ import annotations

import html as escape_lib
from collections.abc import Callable, Mapping, Sequence

from iv2_jax.parallel.plan import report
from iv2_jax.parallel.plan.compile import Step
from iv2_jax.parallel.plan.estimate import MAX_HBM_SHARE
from iv2_jax.parallel.plan.planning import WORDING, Plan

# Colour-blind safe (Okabe and Ito).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
_WIDTH, _BAR, _LABEL = 640, 26, 150
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .85rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .7rem; text-align: right; }
th { border-bottom: 1px solid #999; } td:first-child, th:first-child { text-align: left; }
.fits { color: #00734f; } .not { color: #b33a00; } svg text { font-size: 12px; }
"""


def html(plans: Sequence[Plan]) -> str:
    """The page of one or several plans."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>iv2 plan</title><style>{_STYLE}</style></head><body>",
        f"<p>Compiled {WORDING}.</p>",
        *(_plan(plan) for plan in plans),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _plan(plan: Plan) -> str:
    verdict = ("fits", "fits") if plan.fits else ("not", "does not fit")
    parts = [
        f"<h1>{_safe(plan.name)} on {_safe(str(plan.topology))}</h1>",
        f"<p>{plan.topology.chips} chips, mesh "
        f"{_safe(' x '.join(f'{axis} {size}' for axis, size in plan.mesh.shape.items()))}: "
        f"<b class='{verdict[0]}'>{verdict[1]}</b>, {report.share(plan.hbm_share)} of HBM.</p>",
    ]
    for step in plan.steps:
        parts.append(f"<h2>{_safe(f'Step of {step.kind}' if step.kind else 'The step')}</h2>")
        parts.append(_memory(plan, step))
        found = plan.estimates[step.kind]
        if found is None:
            continue
        names = ("compute", "hbm", "ici", "dcn", "roofline", "bound", "compiler")
        times = {name: getattr(found, f"{name}_seconds") for name in names}
        parts.append(_bars("Least times of a step", times, report.seconds))
        if found.links:
            sent = {f"{k.kind} {'+'.join(k.axes)}": k.sent for k in found.links[:10]}
            parts.append(
                _bars("Sent by a device in a step", sent, lambda value: report.si(value, "B"))
            )
    largest = sorted(plan.sharding, key=lambda row: -row.bytes_per_device)[:12]
    parts.append("<h2>Largest parameters of a device</h2>" + _table(
        ("parameter", "shape", "split as", "MiB", "fallback"),
        [
            (
                row.path,
                "x".join(map(str, row.shape)),
                str(tuple(row.spec)) if any(row.spec) else "whole",
                f"{row.bytes_per_device / 2**20:.2f}",
                row.note,
            )
            for row in largest
        ],
    ))  # fmt: skip
    parts.append(f"<h2>Report</h2><pre>{_safe(report.text(plan))}</pre>")
    return "\n".join(parts)


def _memory(plan: Plan, step: Step) -> str:
    """HBM as one stacked bar with the capacity and the line."""
    held = {name: float(value) for name, value in step.held.items() if value}
    if step.temporaries is not None:
        held["temporaries"] = float(step.temporaries)
    if step.other:
        held["code, padding"] = float(step.other)
    capacity = float(plan.device.hbm_bytes)
    scale = _WIDTH / max(capacity, sum(held.values()))
    x, shapes, legend = 0.0, [], []
    for i, (name, value) in enumerate(held.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        shapes.append(
            f"<rect x='{x:.1f}' y='20' width='{value * scale:.1f}' height='{_BAR}' "
            f"fill='{colour}'><title>{_safe(name)} {report.gib(value)} GiB</title></rect>"
        )
        legend.append(f"<span style='color:{colour}'>&#9632;</span> {_safe(name)} "
                      f"{report.gib(value)} GiB")  # fmt: skip
        x += value * scale
    for share, name in ((MAX_HBM_SHARE, report.share(MAX_HBM_SHARE)), (1.0, "capacity")):
        at = share * capacity * scale
        shapes.append(
            f"<line x1='{at:.1f}' x2='{at:.1f}' y1='14' y2='52' stroke='#222' "
            f"stroke-dasharray='3 2'/><text x='{at:.1f}' y='11' text-anchor='end'>{name}</text>"
        )
    drawn = "".join(shapes)
    return (
        f"<h3>HBM of a device</h3><svg width='{_WIDTH + 10}' height='60' role='img' "
        f"aria-label='memory of a device'>{drawn}</svg><p>{' &nbsp; '.join(legend)}</p>"
    )


def _bars(title: str, values: Mapping[str, float], show: Callable[[float], str]) -> str:
    """Horizontal bars with their values."""
    longest = max(values.values(), default=0.0) or 1.0
    room, rows = _WIDTH - 2 * _LABEL, []
    for i, (name, value) in enumerate(values.items()):
        y, width = i * _BAR, room * value / longest
        rows.append(
            f"<text x='{_LABEL - 6}' y='{y + 17}' text-anchor='end'>{_safe(name)}</text>"
            f"<rect x='{_LABEL}' y='{y + 4}' width='{width:.1f}' height='{_BAR - 8}' "
            f"fill='{_COLOURS[0]}'/>"
            f"<text x='{_LABEL + width + 6:.1f}' y='{y + 17}'>{_safe(show(value))}</text>"
        )
    return (
        f"<h3>{_safe(title)}</h3><svg width='{_WIDTH}' height='{_BAR * len(values) + 4}' "
        f"role='img' aria-label='{_safe(title)}'>{''.join(rows)}</svg>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_safe(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _safe(text: str) -> str:
    return escape_lib.escape(text, quote=True)
