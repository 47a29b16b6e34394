"""Tries batch sizes, meshes and rematerialisation policies, and keeps what none beats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from iv2_jax.errors import ConfigError
from iv2_jax.parallel.described import Topology
from iv2_jax.parallel.plan import hardware, report
from iv2_jax.parallel.plan.compile import REMAT, with_remat
from iv2_jax.parallel.plan.planning import Plan, make_plan
from iv2_jax.train.stage import RunConfig


@dataclass(frozen=True)
class Trial:
    """One combination.

    Attributes:
      batch: Global batch.
      fsdp: Devices that share a copy of the parameters.
      remat: Policy of every trained module.
      plan: What it gave, or None.
      problem: Why there is no plan, or "".
      on_frontier: It fits, and no other that fits is as fast a clip with less memory.
    """

    batch: int
    fsdp: int
    remat: str
    plan: Plan | None
    problem: str = ""
    on_frontier: bool = False

    @property
    def clips_per_second(self) -> float | None:
        """Rate at the compiled bound over all kinds of batches, or None."""
        if self.plan is None or None in self.plan.estimates.values():
            return None
        clips = sum(step.clips for step in self.plan.steps)
        return clips / sum(found.bound_seconds for found in self.plan.estimates.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures."""
        values = {
            name: getattr(self, name)
            for name in ("batch", "fsdp", "remat", "problem", "on_frontier", "clips_per_second")
        }
        return values | {"plan": None if self.plan is None else self.plan.to_dict()}


def search(
    config: RunConfig,
    topology: Topology,
    *,
    name: str = "",
    prices: hardware.Prices | None = None,
    samples: float | None = None,
    batches: Sequence[int] | None = None,
    fsdp: Sequence[int] | None = None,
    remat: Sequence[str] | None = None,
    said: Callable[[str], None] = lambda line: None,
) -> list[Trial]:
    """Compiles every combination, the ones that need least memory first.

    A combination is left out when the same batch and mesh with a policy that keeps less did not
    fit already: it cannot fit either.

    Args:
      config: What to plan.
      topology: The slices.
      name: What it is called.
      prices: Price table.
      samples: Clips to price.
      batches: Global batches; None for the config's, its half and its double.
      fsdp: Sizes of `mesh.fsdp`; None for the config's, a quarter and four times that.
      remat: Policies; None for all.
      said: Called with a line after each compilation.

    Raises:
      ConfigError: An unknown policy.
    """
    remat = list(remat or REMAT)
    if unknown := set(remat) - set(REMAT):
        raise ConfigError(f"--remat: {sorted(unknown)} unknown; policies are {', '.join(REMAT)}")
    devices = topology.chips * hardware.device(topology.chip).per_chip
    batches = batches or [config.batch_size // 2, config.batch_size, 2 * config.batch_size]
    fsdp = fsdp or sorted({max(1, config.mesh.fsdp // 4), config.mesh.fsdp, 4 * config.mesh.fsdp})
    trials: list[Trial] = []
    for batch in batches:
        for size in fsdp:
            # Least memory first; what keeps more cannot fit where less did not.
            full = False
            for policy in sorted(remat, key=REMAT.index, reverse=True):
                trial = Trial(batch, size, policy, None, "a policy that keeps less does not fit")
                if not full:
                    changed = _changed(config, batch, size, policy)
                    trial = _try(trial, changed, topology, name, prices, samples, devices)
                    full = trial.plan is not None and bool(trial.plan.steps[0].failure)
                trials.append(trial)
                said(_line(trial))
    return mark_frontier(trials)


def _changed(config: RunConfig, batch: int, fsdp: int, policy: str) -> RunConfig:
    mesh = dataclasses.replace(config.mesh, data=-1, fsdp=fsdp)
    return with_remat(dataclasses.replace(config, batch_size=batch, mesh=mesh), policy)


def _try(
    trial: Trial,
    config: RunConfig,
    topology: Topology,
    name: str,
    prices: hardware.Prices | None,
    samples: float | None,
    devices: int,
) -> Trial:
    """Plans one combination; one that the mesh or the sharding refuses is a finding."""
    if devices % trial.fsdp:
        problem = f"mesh.fsdp {trial.fsdp} does not divide {devices} devices"
        return dataclasses.replace(trial, problem=problem)
    try:
        plan = make_plan(config, topology, name=name, prices=prices, samples=samples)
    except ConfigError as error:
        return dataclasses.replace(trial, problem=str(error))
    return dataclasses.replace(trial, plan=plan, problem="")


def mark_frontier(trials: Sequence[Trial]) -> list[Trial]:
    """Marks what fits and is beaten by none in both speed and memory; the fastest first."""

    def key(trial: Trial) -> tuple[float, float]:
        return trial.clips_per_second or 0.0, -(trial.plan.hbm_share or 0.0)

    fitting = [t for t in trials if t.plan is not None and t.plan.fits and t.clips_per_second]
    marked = []
    for trial in trials:
        beaten = trial not in fitting or any(
            key(other) != key(trial)
            and all(a >= b for a, b in zip(key(other), key(trial), strict=True))
            for other in fitting
        )
        marked.append(dataclasses.replace(trial, on_frontier=not beaten))
    return sorted(marked, key=lambda t: (not t.on_frontier, -(t.clips_per_second or 0.0)))


def _line(trial: Trial) -> str:
    rate = "" if trial.clips_per_second is None else f", {trial.clips_per_second:,.0f} clips/s"
    share = "" if trial.plan is None else f", HBM {report.share(trial.plan.hbm_share)}"
    problem = trial.problem and f": {trial.problem}"
    return f"batch {trial.batch}, fsdp {trial.fsdp}, remat {trial.remat}{share}{rate}{problem}"


def text(trials: Sequence[Trial]) -> str:
    """All trials as a table, the frontier on top."""
    head = ("", "batch", "fsdp", "remat", "HBM", "clips/s", "of peak", "chip-hours", "verdict")
    rows = [head]
    for trial in trials:
        plan, rate = trial.plan, trial.clips_per_second
        verdict = trial.problem[:60]
        if plan is not None:
            verdict = "fits" if plan.fits else "does not fit"
        bounds = [] if plan is None else [plan.bound(step.kind) for step in plan.steps]
        rows.append(
            (
                "frontier" if trial.on_frontier else "",
                str(trial.batch),
                str(trial.fsdp),
                trial.remat,
                "-" if plan is None else report.share(plan.hbm_share),
                "-" if rate is None else f"{rate:,.0f}",
                "-" if rate is None else report.share(sum(bounds) / len(bounds)),
                "-" if plan is None or plan.cost is None else f"{plan.cost.chip_hours:,.0f}",
                verdict,
            )
        )
    return report.columns(rows)
