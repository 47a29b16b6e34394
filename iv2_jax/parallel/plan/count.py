"""Adds up a compiled program: FLOPs, bytes, cycles and collectives of one device and one step.

The compiler's own `cost_analysis()` counts the body of a loop once, and a scan over 48 blocks is a
loop: here every computation counts as often as the loops around it turn. FLOPs are those of matrix
products and convolutions, two for a multiply-add. Bytes are what instructions read from and write
to HBM, on-chip buffers left out; a fusion counts as one instruction.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from iv2_jax.parallel.plan import hbm, hlo
from iv2_jax.parallel.plan.hlo import Instruction

# How a slice's program hands something to the other slices.
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_OP_NAME = re.compile(r'op_name="([^"]+)"')
# Parts of an instruction's name that say how it was traced, not which module it belongs to.
_WRAPPERS = frozenset(
    (
        "while",
        "body",
        "closed_call",
        "checkpoint",
        "rematted_computation",
        "cond",
        "custom_vjp_call",
    )
)
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


@dataclass(frozen=True)
class Collective:
    """A kind of exchange between the same devices, added up over a step.

    Attributes:
      kind: One of `hbm.COLLECTIVES`.
      group: Partitions that exchange, one group of the alike ones; slices if `between_slices`.
      between_slices: Over the data-centre network, through the hosts.
    """

    kind: str
    group: tuple[int, ...]
    between_slices: bool = False


@dataclass
class Traffic:
    """How often and how much one device exchanges in a step.

    Attributes:
      calls: Exchanges.
      payload: Bytes of the larger of what goes in and what comes out.
      sent: Bytes that leave the device in the best algorithm on a ring.
    """

    calls: float = 0.0
    payload: float = 0.0
    sent: float = 0.0


@dataclass(frozen=True)
class Operation:
    """One instruction that is not in a fusion, as often as it runs.

    Attributes:
      times: Runs in a step.
      flops: Of one run, as are the others.
      bytes: To and from HBM.
      cycles: What the TPU's compiler expects; 0 where it says nothing.
      overlapped: A copy that runs beside others.
      source: The line of the traced step it comes from, else its opcode.
    """

    times: float
    flops: float
    bytes: float
    cycles: int
    overlapped: bool
    source: str = ""


@dataclass
class Counted:
    """Sums of one device and one step.

    Attributes:
      operations: What runs. Kernels written by hand have bytes only; collectives have no cycles.
      collectives: By kind and group.
      kernels: Calls of kernels written by hand, by name.
      unknown_loops: Loops whose turns nobody tells; their bodies count once.
    """

    operations: list[Operation] = field(default_factory=list)
    collectives: dict[Collective, Traffic] = field(default_factory=dict)
    kernels: Counter[str] = field(default_factory=Counter)
    unknown_loops: list[str] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """FLOPs of matrix products and convolutions."""
        return sum(o.times * o.flops for o in self.operations)

    @property
    def bytes(self) -> float:
        """Bytes to and from HBM."""
        return sum(o.times * o.bytes for o in self.operations)

    @property
    def cycles(self) -> float:
        """Cycles that the TPU's compiler expects its own operations to take, one after another."""
        return sum(o.times * o.cycles for o in self.operations)


def count(text: str, devices: int) -> Counted:
    """Adds up the text of a compiled program.

    Args:
      text: From `Compiled.as_text()`.
      devices: Partitions of the program.

    Raises:
      ValueError: It cannot be read; the message says where.
    """
    return _Counter(hlo.parse(text), devices).count()


class _Counter:
    """Walks a program from its entry, each computation as often as it runs."""

    def __init__(self, program: hlo.Program, devices: int) -> None:
        self.program, self.devices = program, devices
        self.total = Counted()
        self.fused_flops = functools.cache(self._fused_flops)

    def count(self) -> Counted:
        self.walk(self.program.entry, 1.0)
        return self.total

    def walk(self, name: str, times: float) -> None:
        """Adds what a computation that is not fused does in `times` runs."""
        computation = self.program.computations[name]
        for instruction in computation.values():
            self.add(instruction, computation, times)
            for called, turns in self.runs(instruction):
                self.walk(called, times * turns)

    def runs(self, instruction: Instruction) -> Iterator[tuple[str, float]]:
        """Computations that an instruction runs, not fuses, and how often."""
        called = instruction.called
        if instruction.opcode == "while":
            turns = hlo.trip_count(self.program, instruction)
            if turns is None:
                self.total.unknown_loops.append(instruction.name)
            yield called["body"], float(1 if turns is None else turns)
        elif instruction.opcode == "conditional":
            branches = [c for role, c in called.items() if role != "to_apply"]
            yield max(branches, key=lambda c: sum(1 for _ in self.reached(c))), 1.0
        elif instruction.opcode in ("call", "async-start"):
            yield from ((c, 1.0) for c in called.values())

    def reached(self, name: str) -> Iterator[Instruction]:
        """All instructions of a computation and of what it calls."""
        for instruction in self.program.computations[name].values():
            yield instruction
            for called in instruction.called.values():
                yield from self.reached(called)

    def add(self, instruction: Instruction, scope: dict[str, Instruction], times: float) -> None:
        """Adds one instruction that is not inside a fusion."""
        opcode = instruction.opcode
        if opcode == "fusion":
            own = self.fused_flops(instruction.called["calls"])
            self.add_fused_collectives(instruction, times)
        else:
            own = flops(instruction, scope)
            self.add_collective(instruction, scope, times)
        if opcode == "custom-call" and "tpu_custom_call" in instruction.attributes:
            self.total.kernels[_kernel_name(instruction)] += times
        cycles = _CYCLES.search(instruction.attributes)
        operation = Operation(
            times=times,
            flops=own,
            bytes=hbm.moved(instruction, scope, self.program),
            cycles=int(cycles.group(1)) if cycles else 0,
            overlapped=opcode.endswith("-start"),
            source=_source(instruction),
        )
        if operation.flops or operation.bytes or operation.cycles:
            self.total.operations.append(operation)

    def _fused_flops(self, name: str) -> float:
        """FLOPs of one run of a fused computation."""
        scope = self.program.computations[name]
        return sum(flops(i, scope) for i in scope.values()) + sum(
            self.fused_flops(i.called["calls"]) for i in scope.values() if i.opcode == "fusion"
        )

    def add_fused_collectives(self, fusion: Instruction, times: float) -> None:
        """Collectives that the compiler has fused with what feeds or follows them.

        A reduce-scatter is printed as an all-reduce whose result is sliced in the same fusion.
        """
        if hbm.carries_on(fusion):
            return
        scope = self.program.computations[fusion.called["calls"]]
        for instruction in scope.values():
            if instruction.opcode == "fusion":
                self.add_fused_collectives(instruction, times)
                continue
            kind = None
            if instruction.opcode == "all-reduce" and 2 * fusion.bytes <= instruction.bytes:
                kind = "reduce-scatter"
            self.add_collective(instruction, scope, times, kind)

    def add_collective(
        self,
        instruction: Instruction,
        scope: dict[str, Instruction],
        times: float,
        kind: str | None = None,
    ) -> None:
        """Adds an instruction if it is a collective or the start of one."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "send" and (found := _MEGASCALE.search(instruction.attributes)):
            key = Collective(found.group(1).lower().replace("_", "-"), _slices(instruction), True)
            given = instruction.shapes[0].bytes
        elif opcode in hbm.COLLECTIVES:
            # Numbers are those of a slice's own partitions, which the first slice's begin with.
            group = tuple(hlo.replica_groups(instruction, self.devices)[0])
            key = Collective(kind or opcode, group)
            given = sum(scope[name].bytes for name in instruction.operands if name in scope)
        else:
            return
        traffic = self.total.collectives.setdefault(key, Traffic())
        size = len(key.group)
        payload, sent = _traffic(key.kind, given, size)
        if size > 1:
            traffic.calls += times
            traffic.payload += times * payload
            traffic.sent += times * sent


def _slices(send: Instruction) -> tuple[int, ...]:
    """Slices that an exchange between slices joins: `{1,2}x{0:3}` or `{1:4}x{0:3}`."""
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', send.attributes)
    found: list[int] = []
    for item in target.group(1).split(",") if target else ():
        first, _, last = item.partition(":")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _traffic(kind: str, given: float, size: int) -> tuple[float, float]:
    """Payload of a collective, and bytes that leave a device, of `given` bytes on each."""
    share = (size - 1) / size
    if kind == "all-gather":
        return given * size, given * (size - 1)
    if kind == "all-reduce":
        return given, 2 * given * share
    if kind in ("collective-permute", "collective-broadcast"):
        return given, given
    return given, given * share


def _source(instruction: Instruction) -> str:
    """`dot_general of .../blocks/mlp/up`: modules without the transformations around them."""
    found = _OP_NAME.search(instruction.attributes)
    if not found:
        return instruction.opcode
    *modules, operation = found.group(1).split("/")
    backward = any(part.startswith("transpose(") for part in modules)
    again = "rematted_computation" in modules
    names = [part for part in modules if "(" not in part and part not in _WRAPPERS]
    phase = "again" if again else "backward" if backward else "forward"
    return f"{operation} of {'/'.join(names[-4:]) or 'the step'}, {phase}"


def _kernel_name(instruction: Instruction) -> str:
    """The name of a Pallas kernel, as its author gave it."""
    named = re.search(r'kernel_name\\?"[:=]\s*\\?"([\w.\-]+)', instruction.attributes)
    if named:
        return named.group(1)
    if path := _OP_NAME.search(instruction.attributes):
        return path.group(1).removesuffix("/pallas_call").rsplit("/", 1)[-1]
    return instruction.name


def flops(instruction: Instruction, scope: dict[str, Instruction]) -> float:
    """FLOPs of a `dot` or `convolution`; 0 of anything else."""
    if instruction.opcode == "dot":
        left = scope[instruction.operands[0]].shapes[0].dims
        contracted = re.findall(r"\d+", instruction.field("lhs_contracting_dims"))
        return 2.0 * instruction.shapes[0].size * math.prod(left[int(i)] for i in contracted)
    if instruction.opcode == "convolution":
        left, right = (scope[name].shapes[0].dims for name in instruction.operands[:2])
        return _convolution_flops(instruction, left, right)
    return 0.0


def _convolution_flops(
    instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
    """Multiply-adds with real inputs only; TPU programs write matrix products in this way too."""
    lhs, _, rest = instruction.field("dim_labels").partition("_")
    rhs, _, out = rest.partition("->")
    result = instruction.shapes[0].dims
    spatial = [c for c in out if c.isdigit()]
    pairs = 1
    for number, window in zip(sorted(spatial), hlo.windows(instruction, len(spatial)), strict=True):
        pairs *= window.pairs(left[lhs.index(number)], result[out.index(number)])
    batch_groups = int(instruction.field("batch_group_count") or 1)
    # The kernel's input features are already those of one group.
    inputs = right[rhs.index("i")]
    batch = left[lhs.index("b")] // batch_groups
    return 2.0 * inputs * result[out.index("f")] * batch * pairs
