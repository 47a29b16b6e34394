"""A plan: one config on one topology, compiled, added up and priced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from iv2_jax.parallel.described import Topology
from iv2_jax.parallel.plan import hardware
from iv2_jax.parallel.plan.compile import Step, compile_steps, fit_mesh
from iv2_jax.parallel.plan.estimate import MAX_HBM_SHARE, Cost, Estimate, cost, estimate
from iv2_jax.parallel.rules import ShardedParameter
from iv2_jax.train.stage import RunConfig

WORDING = "ahead of time, not run on hardware"


@dataclass(frozen=True)
class Plan:
    """What compiling a config for a topology told.

    Attributes:
      name: What was planned, for people.
      config: The config as planned.
      topology: Slices.
      mesh: Device mesh.
      device: Figures of a device.
      steps: Compiled step of each kind of batch.
      estimates: Kind -> times; None where nothing compiled.
      cost: Time and price at the compiled bound; None where a step has no estimate.
      sharding: How parameters are split.
      frozen_sharding: How frozen weights are split.
      notes: What was changed on the way.
    """

    name: str
    config: RunConfig
    topology: Topology
    mesh: Mesh
    device: hardware.Device
    steps: list[Step]
    estimates: dict[str, Estimate | None]
    cost: Cost | None
    sharding: list[ShardedParameter]
    frozen_sharding: list[ShardedParameter]
    notes: list[str]

    @property
    def hbm_share(self) -> float | None:
        """Largest share of HBM that a step takes; None when the compiler gave no figure."""
        totals = [step.total_bytes for step in self.steps]
        if None in totals:
            return None
        return max(totals) / self.device.hbm_bytes

    @property
    def fits(self) -> bool:
        """Whether every step compiled and stays below `MAX_HBM_SHARE`."""
        compiled = not any(step.failure for step in self.steps)
        return compiled and self.hbm_share is not None and self.hbm_share <= MAX_HBM_SHARE

    def bound(self, kind: str, seconds: str = "bound_seconds") -> float | None:
        """Share of the peak that the model's FLOPs are in a time of the estimate."""
        found = self.estimates[kind]
        step = next(s for s in self.steps if s.kind == kind)
        if found is None:
            return None
        return step.model_flops / (self.mesh.size * self.device.peak * getattr(found, seconds))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready figures."""
        return {
            "config": self.name,
            "topology": str(self.topology),
            "chips": self.topology.chips,
            "devices": self.mesh.size,
            "mesh": dict(self.mesh.shape),
            "wording": f"compiled {WORDING}",
            "hbm_capacity": self.device.hbm_bytes,
            "hbm_share": self.hbm_share,
            "fits": self.fits,
            "steps": {step.kind or "step": self._step_dict(step) for step in self.steps},
            "cost": None if self.cost is None else vars(self.cost),
            "sharding": [_row(row) for row in self.sharding],
            "frozen_sharding": [_row(row) for row in self.frozen_sharding],
            "notes": self.notes,
        }

    def _step_dict(self, step: Step) -> dict[str, Any]:
        found = self.estimates[step.kind]
        values: dict[str, Any] = {
            "clips": step.clips,
            "clips_per_device": step.clips / self.mesh.size,
            "held_bytes": dict(step.held),
            "temporary_bytes": step.temporaries,
            "other_bytes": step.other,
            "total_bytes": step.total_bytes,
            "failure": step.failure,
            "model_flops": step.model_flops,
            "traced_flops": step.asked_flops,
            "kernel_flops": step.kernel_flops,
            "compile_seconds": round(step.compile_seconds, 1),
        }
        if found is None:
            return values
        values |= {
            "hardware_flops": found.hardware_flops,
            "hbm_traffic_bytes": found.hbm_bytes,
            "seconds": {
                name: getattr(found, f"{name}_seconds")
                for name in ("compute", "hbm", "ici", "dcn", "roofline", "bound", "compiler")
            },
            "limited_by": found.limited_by,
            "compiled_bound": self.bound(step.kind),
            "compiler_bound": self.bound(step.kind, "compiler_seconds"),
            "collectives": [vars(link) | {"axes": list(link.axes)} for link in found.links],
            "heaviest": [vars(heavy) for heavy in found.heaviest],
            "notes": list(found.notes),
        }
        return values


def _row(row: ShardedParameter) -> dict[str, Any]:
    """A row of the sharding report."""
    return {
        "path": row.path,
        "shape": list(row.shape),
        "logical": list(row.logical),
        "split": [list(axis) if isinstance(axis, tuple) else axis for axis in row.spec],
        "bytes_per_device": row.bytes_per_device,
        "note": row.note,
    }


def make_plan(
    config: RunConfig,
    topology: Topology,
    *,
    name: str = "",
    prices: hardware.Prices | None = None,
    samples: float | None = None,
    hlo: Path | None = None,
) -> Plan:
    """Compiles a config's training steps for a topology and adds them up.

    Args:
      config: Any stage's run config.
      topology: The slices.
      name: What it is called.
      prices: Price table; None for the package's.
      samples: Clips to price; None for the config's whole run.
      hlo: Folder for the text of the compiled programs.

    Raises:
      ConfigError: Config, mesh and topology do not fit each other, or there is no price.
    """
    device = hardware.device(topology.chip)
    config, note = fit_mesh(config, topology.chips * device.per_chip)
    program, steps = compile_steps(config, topology, hlo)
    estimates = {step.kind: estimate(step, program.mesh, topology) for step in steps}
    total = None
    if all(found is not None for found in estimates.values()):
        clips = {step.kind: step.clips for step in steps}
        total = cost(
            {kind: found.bound_seconds for kind, found in estimates.items()},
            clips,
            samples or config.steps * sum(clips.values()) / len(clips),
            topology,
            prices or hardware.prices(),
        )
    return Plan(
        name=name,
        config=config,
        topology=topology,
        mesh=program.mesh,
        device=device,
        steps=steps,
        estimates=estimates,
        cost=total,
        sharding=program.sharding,
        frozen_sharding=program.frozen_sharding,
        notes=[note] if note else [],
    )
