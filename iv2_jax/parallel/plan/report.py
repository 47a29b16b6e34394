"""A plan as text: for a terminal, and as a page of documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from iv2_jax.parallel import rules
from iv2_jax.parallel.plan.compile import Step
from iv2_jax.parallel.plan.estimate import MAX_HBM_SHARE, Estimate
from iv2_jax.parallel.plan.planning import WORDING, Plan

_UNITS = ("", "K", "M", "G", "T", "P", "E", "Z")


def si(value: float, unit: str) -> str:
    """`1.23 TB`: three digits with a decimal prefix."""
    step = 0
    while abs(value) >= 999.5 and step < len(_UNITS) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {_UNITS[step]}{unit}"


def gib(value: float) -> str:
    """Bytes in GiB."""
    return f"{value / 2**30:.2f}"


def seconds(value: float) -> str:
    """A time in seconds or milliseconds."""
    return f"{value:.3f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def share(value: float | None) -> str:
    """A share in per cent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows of cells as aligned columns; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append((indent + "  ".join([first.strip().ljust(widths[0]), *rest])).rstrip())
    return "\n".join(lines)


def text(plan: Plan, *, sharding: bool = False, operations: int = 0) -> str:
    """The report; with `sharding` the table of all parameters, and so many heaviest operations."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    parts = [
        f"{plan.name} on {plan.topology}: {plan.topology.chips} chips, mesh {mesh}",
        f"{verdict}: {share(plan.hbm_share)} of HBM (line at {share(MAX_HBM_SHARE)}); "
        f"compiled {WORDING}",
        *(f"note: {note}" for note in plan.notes),
    ]
    for step in plan.steps:
        parts += ["", *_step(plan, step)]
        found = plan.estimates[step.kind]
        if operations and found is not None:
            parts += _operations(found, operations)
    if plan.cost:
        cost = plan.cost
        parts += [
            "",
            f"{si(cost.samples, 'clips')} = {cost.steps:,} steps: {cost.hours:,.1f} h, "
            f"{cost.chip_hours:,.0f} chip-hours, {cost.price:,.0f} {cost.currency} at the compiled "
            "bound; expect 1.1 to 1.35 times as much",
        ]
    fallbacks = [row for row in (*plan.sharding, *plan.frozen_sharding) if row.note]
    parts += ["", rules.describe(plan.sharding)]
    if plan.frozen_sharding:
        parts.append("frozen " + rules.describe(plan.frozen_sharding))
    if not fallbacks:
        parts.append("every rule of the sharding table could be followed")
    if sharding:
        parts += ["", rules.table([*plan.sharding, *plan.frozen_sharding])]
    return "\n".join(parts)


def markdown(values: Mapping[str, Any], report: str, command: str) -> str:
    """A page about a recipe: what to rent, what to expect, and the whole report.

    Args:
      values: `Plan.to_dict()`, or a file that `iv2 plan --json` wrote.
      report: `text` of the same plan.
      command: What makes the page.
    """
    steps = values["steps"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in values["mesh"].items())
    rows = [
        ("chips", f"{values['chips']}, `{values['topology']}`"),
        ("mesh", mesh),
        ("global batch", ", ".join(sorted({f"{step['clips']}" for step in steps.values()}))),
        ("HBM of a device", f"{share(values['hbm_share'])} of {gib(values['hbm_capacity'])} GiB"),
    ]
    for kind, step in steps.items():
        if "seconds" in step:
            named = "" if kind == "step" else f" of {kind}"
            rows.append((f"step{named}", seconds(step["seconds"]["bound"])))
            rows.append((f"share of the peak{named}", share(step["compiled_bound"])))
            more = step["hardware_flops"] / step["model_flops"]
            rows.append((f"hardware / model FLOPs{named}", f"{more:.2f}"))
    if cost := values["cost"]:
        price = f"{cost['chip_hours']:,.0f} chip-hours, {cost['price']:,.0f} {cost['currency']}"
        rows.append((f"whole run, {si(cost['samples'], 'clips')}", price))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""# {values["config"]} on {values["topology"]}

Compiled {WORDING}: times are bounds, a real step takes 1.1 to 1.35 times as long. Written by

```
{command}
```

| | |
|---|---|
{table}

## The plan

```
{report}
```
"""


def _operations(found: Estimate, most: int) -> list[str]:
    """Lines about the operations that take the most of the compiled bound."""
    head = ("operations by where they come from", "bound", "runs", "FLOP", "HBM")
    rows = [
        (
            heavy.source,
            share(heavy.seconds / found.bound_seconds),
            f"{heavy.times:.0f}",
            si(heavy.flops, ""),
            si(heavy.bytes, "B"),
        )
        for heavy in found.heaviest[:most]
    ]
    return [columns([head, *rows])]


def _step(plan: Plan, step: Step) -> list[str]:
    """Lines about one kind's step."""
    per_device = step.clips / plan.mesh.size
    named = f"step of {step.kind}" if step.kind else "step"
    lines = [f"{named}: {step.clips} clips, {per_device:g} a device", "HBM of a device, GiB"]
    rows = [(name, gib(value)) for name, value in step.held.items() if value]
    if step.temporaries is not None:
        rows.append(("temporaries", gib(step.temporaries)))
    if step.other:
        rows.append(("code, padding", gib(step.other)))
    if step.total_bytes is not None:
        rows.append(("together", gib(step.total_bytes)))
    rows.append(("capacity", gib(plan.device.hbm_bytes)))
    lines.append(columns(rows))
    if step.failure:
        lines.append(f"not compiled: {step.failure}")
    found = plan.estimates[step.kind]
    return lines if found is None else [*lines, *_figures(plan, step, found)]


def _figures(plan: Plan, step: Step, found: Estimate) -> list[str]:
    """FLOPs, times and collectives."""
    rows = [
        ("model", si(step.model_flops, "FLOP"), ""),
        ("hardware", si(found.hardware_flops, "FLOP"),
         f"{found.hardware_flops / step.model_flops:.2f} x model"),
        ("HBM traffic of a device", si(found.hbm_bytes, "B"), ""),
    ]  # fmt: skip
    times = [
        (name, seconds(getattr(found, f"{name}_seconds")))
        for name in ("compute", "hbm", "ici", "dcn")
    ]
    lines = ["a step", columns(rows), "least times", columns(times)]
    lines.append(
        f"roofline {seconds(found.roofline_seconds)} (limited by {found.limited_by}); "
        f"compiled bound {seconds(found.bound_seconds)} = {share(plan.bound(step.kind))} of peak, "
        f"{step.clips / found.bound_seconds:,.0f} clips/s; by the compiler's own cycles "
        f"{seconds(found.compiler_seconds)} = {share(plan.bound(step.kind, 'compiler_seconds'))}"
    )
    if found.links:
        head = ("collective", "axes", "over", "calls", "payload", "sent", "time")
        table = [
            (
                link.kind,
                "+".join(link.axes),
                link.network,
                f"{link.calls:.0f}",
                si(link.payload, "B"),
                si(link.sent, "B"),
                seconds(link.ici_seconds + link.dcn_seconds),
            )
            for link in found.links
        ]
        lines += ["collectives of a device", columns([head, *table])]
    return [*lines, *(f"note: {note}" for note in found.notes)]
