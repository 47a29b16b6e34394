"""Turns the sums of a compiled step into times: roofline, compiled bound, chip-hours and cost.

Nothing here has run on hardware. Times are bounds from below: compute, memory and links are each
taken at their full rate and as perfectly overlapping. Expect a real step to take 1.1 to 1.35 times
the compiled bound's time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh

from iv2_jax.parallel.described import Topology
from iv2_jax.parallel.plan import hardware
from iv2_jax.parallel.plan.compile import Step
from iv2_jax.parallel.plan.count import Counted, Operation

# The line between "fits" and not: the rest is for fragmentation and what libraries reserve.
MAX_HBM_SHARE = 0.85
# Compiled and traced FLOPs must agree within this, or a note says so.
FLOPS_TOLERANCE = 0.03
# A kernel written by hand tells no time; half of the peak is what such kernels reach.
KERNEL_SHARE_OF_PEAK = 0.5


@dataclass(frozen=True)
class Link:
    """What one kind of collective moves over one set of mesh axes.

    Attributes:
      kind: "all-gather", ....
      axes: Mesh axes over which devices exchange.
      network: "ici", "dcn" or "ici+dcn".
      calls: Exchanges of a step.
      payload: Bytes of a step, of one device: what comes in or goes out, whichever is more.
      sent: Bytes that leave a device in a step.
      ici_seconds: Time on the links within a slice.
      dcn_seconds: Time between slices.
    """

    kind: str
    axes: tuple[str, ...]
    network: str
    calls: float
    payload: float
    sent: float
    ici_seconds: float
    dcn_seconds: float


@dataclass(frozen=True)
class Heavy:
    """All operations of one device that come from the same line of the traced step.

    Attributes:
      source: The line.
      seconds: Their part of the compiled bound.
      times: Runs in a step.
      flops: Of all runs.
      bytes: To and from HBM, of all runs.
    """

    source: str
    seconds: float
    times: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """Times of one kind's step; FLOPs are of all devices, the rest of one.

    Attributes:
      hardware_flops: What the compiled program does, kernels written by hand included.
      hbm_bytes: To and from memory.
      compute_seconds: Hardware FLOPs at the peak.
      hbm_seconds: Bytes at the memory's rate.
      ici_seconds: Collectives within slices.
      dcn_seconds: Collectives between slices.
      bound_seconds: Compiled bound: matrix products at the compiler's cycles, everything else at
        the memory's rate, kernels at half of the peak; at least the links' times.
      compiler_seconds: The compiler's own cycles of all operations, and kernels as above.
      links: Collectives.
      heaviest: Operations that take the most of the compiled bound, by where they come from; a
        kernel written by hand has its bytes' time only.
      notes: What to know about the figures.
    """

    hardware_flops: float
    hbm_bytes: float
    compute_seconds: float
    hbm_seconds: float
    ici_seconds: float
    dcn_seconds: float
    bound_seconds: float
    compiler_seconds: float
    links: tuple[Link, ...] = ()
    heaviest: tuple[Heavy, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def roofline_seconds(self) -> float:
        """The slowest of compute, memory and links."""
        return max(self.compute_seconds, self.hbm_seconds, self.ici_seconds, self.dcn_seconds)

    @property
    def limited_by(self) -> str:
        """Which of them that is."""
        names = ("compute", "hbm", "ici", "dcn")
        return max(names, key=lambda name: getattr(self, f"{name}_seconds"))


def estimate(step: Step, mesh: Mesh, topology: Topology) -> Estimate | None:
    """Times of a compiled step; None when there is no compiled program to go by."""
    counted = step.counted
    if counted is None:
        return None
    device = hardware.device(topology.chip)
    devices = mesh.size
    kernel = step.kernel_flops / devices
    links = tuple(_links(counted, mesh, topology, device))
    ici, dcn = (sum(getattr(k, f"{n}_seconds") for k in links) for n in ("ici", "dcn"))
    kernel_seconds = kernel / (KERNEL_SHARE_OF_PEAK * device.peak)
    operations = sum(o.times * _seconds(o, device) for o in counted.operations if not o.overlapped)
    hbm = counted.bytes / device.hbm_bandwidth
    compute = (counted.flops + kernel) / device.peak
    return Estimate(
        hardware_flops=(counted.flops + kernel) * devices,
        hbm_bytes=counted.bytes,
        compute_seconds=compute,
        hbm_seconds=hbm,
        ici_seconds=ici,
        dcn_seconds=dcn,
        bound_seconds=max(operations + kernel_seconds, hbm, compute, ici, dcn),
        compiler_seconds=max(counted.cycles / device.clock + kernel_seconds, ici, dcn),
        links=links,
        heaviest=_heaviest(counted, device),
        notes=tuple(_notes(step, counted, devices)),
    )


def _heaviest(counted: Counted, device: hardware.Device, most: int = 40) -> tuple[Heavy, ...]:
    """Operations added up by source, the longest first."""
    sums: dict[str, list[float]] = {}
    for o in counted.operations:
        if not o.overlapped:
            found = sums.setdefault(o.source, [0.0] * 4)
            own = (_seconds(o, device), 1.0, o.flops, o.bytes)
            found[:] = [a + o.times * b for a, b in zip(found, own, strict=True)]
    longest = sorted(sums.items(), key=lambda item: -item[1][0])[:most]
    return tuple(Heavy(source, *values) for source, values in longest)


def _seconds(operation: Operation, device: hardware.Device) -> float:
    """Least time of one operation: the compiler's cycles for matrix products, else its bytes."""
    moving = operation.bytes / device.hbm_bandwidth
    if not operation.flops:
        return moving
    return max(moving, operation.cycles / device.clock, operation.flops / device.peak)


def _notes(step: Step, counted: Counted, devices: int) -> list[str]:
    notes = []
    compiled = counted.flops * devices + step.kernel_flops
    ratio = compiled / step.asked_flops - 1 if step.asked_flops else 0.0
    if abs(ratio) > FLOPS_TOLERANCE:
        notes.append(
            f"the compiled program does {100 * ratio:+.1f} % of the traced FLOPs "
            f"({compiled:.3e} against {step.asked_flops:.3e}): "
            + ("work is repeated on several devices" if ratio > 0 else "some of it was dropped")
        )
    if counted.unknown_loops:
        names = ", ".join(counted.unknown_loops[:3])
        notes.append(f"loops whose turns are not known count once: {names}")
    return notes


def _links(counted: Counted, mesh: Mesh, topology: Topology, device: hardware.Device) -> list[Link]:
    """Collectives by kind and mesh axes, the largest first."""
    table: dict[tuple[str, tuple[str, ...], str], list[float]] = {}
    for collective, traffic in counted.collectives.items():
        if not traffic.calls:
            continue
        if collective.between_slices:
            axes, ici, dcn = ("data",), 0.0, traffic.sent / device.dcn
        else:
            axes = group_axes(collective.group, mesh)
            ici, dcn = _times(
                collective.kind, collective.group, traffic.sent, mesh, topology, device
            )
        network = "+".join(n for n, seconds in (("ici", ici), ("dcn", dcn)) if seconds)
        row = table.setdefault((collective.kind, axes, network), [0.0] * 5)
        values = (traffic.calls, traffic.payload, traffic.sent, ici, dcn)
        row[:] = [a + b for a, b in zip(row, values, strict=True)]
    links = [Link(*key, *values) for key, values in table.items()]
    return sorted(links, key=lambda link: -(link.ici_seconds + link.dcn_seconds))


def group_axes(group: Sequence[int], mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ."""
    places = np.stack(np.unravel_index(np.asarray(group), mesh.devices.shape))
    return tuple(
        name
        for name, places_of in zip(mesh.axis_names, places, strict=True)
        if len(set(places_of.tolist())) > 1
    )


def _times(
    kind: str,
    group: Sequence[int],
    sent: float,
    mesh: Mesh,
    topology: Topology,
    device: hardware.Device,
) -> tuple[float, float]:
    """Seconds within slices and between them for `sent` bytes out of each device of a group.

    Within a slice a group uses the links of every axis of the torus that it extends along: two on
    an axis that closes to a ring and that it fills, one otherwise. Between slices an all-reduce is
    done in parts: devices of a slice reduce first, and each sends only its part on.
    """
    members = [mesh.devices.flat[i] for i in group]
    by_slice: dict[int, list[jax.Device]] = {}
    for member in members:
        by_slice.setdefault(getattr(member, "slice_index", None) or 0, []).append(member)
    slices, local = len(by_slice), max(len(m) for m in by_slice.values())
    size = len(members)
    dcn = 0.0
    if slices > 1:
        # Of (size - 1) parts that a device sends in a ring of all, slices - 1 cross the network.
        dcn = sent * (slices - 1) / (size - 1) / device.dcn
    if local == 1:
        return 0.0, dcn
    within = sent * (slices * (local - 1)) / (size - 1) if slices > 1 else sent
    if kind == "collective-permute":
        within = sent
    links = 0.0
    inside = next(iter(by_slice.values()))
    for axis, edge in enumerate(topology.shape):
        places = {member.coords[axis] for member in inside}
        if len(places) > 1:
            links += 2 if topology.wrap[axis] and len(places) == edge else 1
    return within / (max(links, 1.0) * device.ici_link), dcn


@dataclass(frozen=True)
class Cost:
    """What a number of samples takes.

    Attributes:
      samples: Clips.
      steps: Optimizer steps.
      hours: Wall time at the compiled bound.
      chip_hours: Times the chips.
      price: In `currency`.
      currency: Of the price table.
    """

    samples: float
    steps: int
    hours: float
    chip_hours: float
    price: float
    currency: str


def cost(
    seconds: Mapping[str, float],
    clips: Mapping[str, int],
    samples: float,
    topology: Topology,
    prices: hardware.Prices,
) -> Cost:
    """Time and price of so many samples, kinds of batches taking turns.

    Args:
      seconds: Kind of batch -> time of its step.
      clips: Kind of batch -> rows of its batch.
      samples: Clips to train on.
      topology: The slices.
      prices: Price table.

    Raises:
      ConfigError: The table has no such chip.
    """
    steps = math.ceil(samples / (sum(clips.values()) / len(clips)))
    hours = steps * sum(seconds.values()) / len(seconds) / 3600
    chip_hours = hours * topology.chips
    price = chip_hours * prices.of(topology.chip)
    return Cost(samples, steps, hours, chip_hours, price, prices.currency)
