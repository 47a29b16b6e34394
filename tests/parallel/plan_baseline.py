"""The committed plans: what key configs took when they were last compiled.

    python -m tests.parallel.plan_baseline 1b_v5e   # compile again and write the figures
    python -m tests.parallel.plan_baseline --from 1b_v5e=plan.json   # written by `iv2 plan --json`

A change that makes a plan more than 3 % worse fails the tests; one that makes it better, or that is
worse for a reason, is committed with its new figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.train import tiny

if TYPE_CHECKING:
    from iv2_jax.parallel.plan.planning import Plan

FILE = Path(__file__).with_name("plan_baseline.json")
TOLERANCE = 0.03


def read() -> dict[str, Any]:
    """Name -> {config, topology, slices, overrides, figures}."""
    return json.loads(FILE.read_text())["plans"]


def figures(plan: Mapping[str, Any]) -> dict[str, float]:
    """What is compared of a plan's JSON, over all kinds of batches; more is worse."""
    steps = plan["steps"].values()
    return {
        "hardware_flops": sum(s["hardware_flops"] for s in steps),
        "hbm_traffic_bytes": sum(s["hbm_traffic_bytes"] for s in steps),
        "hbm_bytes": max(s["total_bytes"] for s in steps),
        "sent_bytes": sum(c["sent"] for s in steps for c in s["collectives"]),
        "bound_seconds": sum(s["seconds"]["bound"] for s in steps),
    }


def worse(now: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    """Figures that are more than `TOLERANCE` above those before."""
    return [
        f"{name}: {now[name]:.4g}, was {value:.4g} ({100 * (now[name] / value - 1):+.1f} %)"
        for name, value in before.items()
        if now[name] > (1 + TOLERANCE) * value
    ]


def compile_again(name: str) -> Plan:
    """Compiles a committed plan."""
    import jax

    from iv2_jax.parallel import described
    from iv2_jax.parallel.plan.planning import make_plan
    from iv2_jax.train.loop import read_config

    entry = read()[name]
    topology = described.topology(entry["topology"], entry["slices"])
    with pytest.MonkeyPatch.context() as patch, jax.default_matmul_precision("default"):
        if entry["config"] == "tests.train.tiny":
            tiny.register(patch)
            config = tiny.config(mesh=entry["overrides"])
        else:
            config = read_config(entry["config"], entry["overrides"])
        return make_plan(config, topology, name=name, samples=1000)


def main() -> None:
    """Writes figures of the named plans."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--from", dest="files", nargs="*", default=[], metavar="NAME=FILE")
    args = parser.parse_args()
    plans = read()
    for name in args.names:
        plans[name]["figures"] = figures(compile_again(name).to_dict())
    for given in args.files:
        name, _, file = given.partition("=")
        plans[name]["figures"] = figures(json.loads(Path(file).read_text()))
    FILE.write_text(json.dumps({"plans": plans}, indent=1) + "\n")


if __name__ == "__main__":
    main()
