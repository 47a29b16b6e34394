"""Counts the FLOPs of a function as it is written, before any compiler has seen it.

Every matrix product and convolution of the traced program counts by its shapes, loops as often as
they turn; nothing is run. Traced without rematerialisation and with plain attention this is what
the model needs (forward and backward); traced as the run does it, it is what a compiler is asked
for, and the sum that the compiled program's is checked against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jax.extend import core

from iv2_jax.parallel.plan.hlo import Window


@dataclass
class TracedFlops:
    """FLOPs of all devices and one call.

    Attributes:
      outside: In operations that the compiler sees.
      kernels: In Pallas kernels, by name: the blocks they cover, padding included.
      calls: Calls of those kernels, each device's its own.
      open_loops: `while` loops whose turns the program does not tell; their bodies count once.
    """

    outside: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)
    calls: dict[str, float] = field(default_factory=dict)
    open_loops: int = 0

    @property
    def total(self) -> float:
        """All of them."""
        return self.outside + sum(self.kernels.values())


def count(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> TracedFlops:
    """Adds up a traced function (`jax.make_jaxpr(f)(...)`, `jax.jit(f).trace(...).jaxpr`)."""
    total = TracedFlops()
    _walk(_open(jaxpr), 1.0, total, None)
    return total


def _open(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _walk(jaxpr: core.Jaxpr, times: float, total: TracedFlops, kernel: str | None) -> None:
    """Adds one jaxpr that runs `times` times, inside a Pallas kernel or not."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            _add(total, kernel, times * _dot_flops(equation))
        elif name == "conv_general_dilated":
            _add(total, kernel, times * _convolution_flops(equation))
        elif name == "scan":
            _walk(_open(equation.params["jaxpr"]), times * equation.params["length"], total, kernel)
        elif name == "while":
            turns = _most_turns(equation)
            total.open_loops += turns is None
            _walk(_open(equation.params["body_jaxpr"]), times * (turns or 1), total, kernel)
        elif name == "cond":
            branches = [_flops_of(b) for b in equation.params["branches"]]
            heaviest = max(range(len(branches)), key=branches.__getitem__)
            _walk(_open(equation.params["branches"][heaviest]), times, total, kernel)
        elif name == "pallas_call":
            _add_kernel(equation, times, total)
        elif name == "shard_map":
            mesh, manual = equation.params["mesh"], equation.params["newly_manual_axes"]
            devices = math.prod(mesh.shape[axis] for axis in manual)
            _walk(_open(equation.params["jaxpr"]), times * devices, total, kernel)
        else:
            for inner in _jaxprs(equation.params):
                _walk(inner, times, total, kernel)


def _most_turns(loop: Any) -> int | None:
    """The smallest constant that the condition of a `while` wants a carried number below."""
    condition = _open(loop.params["cond_jaxpr"])
    limits = [
        int(equation.invars[1].val)
        for equation in condition.eqns
        if equation.primitive.name == "lt"
        and equation.invars[0] in condition.invars
        and isinstance(equation.invars[1], core.Literal)
    ]
    return min(limits, default=None)


def _flops_of(jaxpr: Any) -> float:
    part = TracedFlops()
    _walk(_open(jaxpr), 1.0, part, None)
    return part.total


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The program that a call runs; rules for its derivatives are no calls."""
    for name, value in params.items():
        if name in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_thunk"):
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                yield _open(item)


def _add(total: TracedFlops, kernel: str | None, flops: float) -> None:
    if kernel is None:
        total.outside += flops
    else:
        total.kernels[kernel] = total.kernels.get(kernel, 0.0) + flops


def _add_kernel(equation: Any, times: float, total: TracedFlops) -> None:
    """A Pallas kernel: its body once for each point of its grid."""
    params = equation.params
    name = str(getattr(params.get("name_and_src_info"), "name", None) or params.get("name"))
    grid = math.prod(int(n) for n in params["grid_mapping"].grid)
    total.calls[name] = total.calls.get(name, 0.0) + times
    _walk(_open(params["jaxpr"]), times * grid, total, name)


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution_flops(equation: Any) -> float:
    """Multiply-adds with real inputs: neither padding nor the holes of a dilated input."""
    params, out = equation.params, equation.outvars[0].aval.shape
    left, right = (v.aval.shape for v in equation.invars)
    numbers = params["dimension_numbers"]
    pairs = 1
    for i, (low, high) in enumerate(params["padding"]):
        window = Window(
            size=right[numbers.rhs_spec[2 + i]],
            stride=params["window_strides"][i],
            pad_low=low,
            pad_high=high,
            lhs_dilate=params["lhs_dilation"][i],
            rhs_dilate=params["rhs_dilation"][i],
        )
        pairs *= window.pairs(left[numbers.lhs_spec[2 + i]], out[numbers.out_spec[2 + i]])
    inputs, batch = right[numbers.rhs_spec[1]], left[numbers.lhs_spec[0]]
    batch //= params["batch_group_count"]
    return 2.0 * inputs * out[numbers.out_spec[1]] * batch * pairs
