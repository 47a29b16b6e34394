"""Compiles the real training step of a config for a described slice, and collects what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from iv2_jax.errors import ConfigError
from iv2_jax.kernels.choice import prefer_backend, trace_for
from iv2_jax.models.block_stack import REMAT_POLICIES
from iv2_jax.parallel import described
from iv2_jax.parallel.mesh import MeshConfig, make_mesh
from iv2_jax.parallel.plan import count as count_lib
from iv2_jax.parallel.plan import traced
from iv2_jax.parallel.plan.count import Counted
from iv2_jax.train.program import Program, build_program
from iv2_jax.train.stage import RunConfig

logger = logging.getLogger(__name__)

REMAT = tuple(REMAT_POLICIES)  # what keeps most first
_SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Step:
    """The compiled step of one kind of batch; all figures but FLOPs are of one device.

    Attributes:
      kind: Kind of batch ("" where there is one only).
      clips: Rows of the global batch.
      held: Bytes held between steps, by what holds them.
      temporaries: Bytes needed during the step, or None when the compiler gave up.
      other: Bytes of code, and of results that do not take an argument's place.
      failure: Why it was not compiled, or "".
      model_flops: What the model needs, all devices.
      asked_flops: What the traced step asks for (rematerialisation, padded kernels), all devices.
      kernel_flops: The part of it in kernels written by hand, all devices.
      counted: Sums over the compiled program, or None.
      compile_seconds: Wall time.
    """

    kind: str
    clips: int
    held: Mapping[str, int]
    temporaries: int | None
    other: int
    failure: str
    model_flops: float
    asked_flops: float
    kernel_flops: float
    counted: Counted | None
    compile_seconds: float

    @property
    def total_bytes(self) -> int | None:
        """Bytes of HBM at the worst moment, or None."""
        if self.temporaries is None:
            return None
        return sum(self.held.values()) + self.temporaries + self.other


def fit_mesh(config: RunConfig, devices: int) -> tuple[RunConfig, str]:
    """The config on so many devices: `mesh.data` takes up the difference where it can.

    Returns:
      The config, and a note on what was changed or "".

    Raises:
      ConfigError: fsdp x tensor does not divide the devices.
    """
    mesh = config.mesh
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    if -1 in sizes or math.prod(sizes) == devices:
        return config, ""
    if devices % (mesh.fsdp * mesh.tensor):
        raise ConfigError(
            f"mesh.fsdp x mesh.tensor = {mesh.fsdp} x {mesh.tensor} does not divide {devices} "
            "devices; set --config.mesh.fsdp"
        )
    data = devices // (mesh.fsdp * mesh.tensor)
    mesh = dataclasses.replace(mesh, data=data, max_devices=0)
    note = f"mesh.data {config.mesh.data} -> {data}, to fill {devices} devices"
    return dataclasses.replace(config, mesh=mesh), note


def with_remat(config: Any, policy: str) -> Any:
    """A config with every module's `remat` set to a policy, frozen teachers' too."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        changes = {}
        for field in dataclasses.fields(config):
            if not field.init:
                continue
            value = getattr(config, field.name)
            is_policy = field.name == "remat" and value in REMAT
            changed = policy if is_policy else with_remat(value, policy)
            if changed is not value:
                changes[field.name] = changed
        return dataclasses.replace(config, **changes) if changes else config
    if isinstance(config, dict):
        changed = {k: with_remat(v, policy) for k, v in config.items()}
        return changed if any(changed[k] is not v for k, v in config.items()) else config
    if isinstance(config, tuple):
        changed = tuple(with_remat(v, policy) for v in config)
        return changed if any(a is not b for a, b in zip(changed, config, strict=True)) else config
    return config


def build(config: RunConfig, topology: described.Topology) -> Program:
    """The program of a config on a described slice.

    Raises:
      ConfigError: Mesh, batch and slice do not fit each other.
    """
    mesh = make_mesh(config.mesh, topology.devices())
    with trace_for("tpu"):
        return build_program(config, config.make_stage(), mesh)


def compile_steps(
    config: RunConfig, topology: described.Topology, hlo: Path | None = None
) -> tuple[Program, list[Step]]:
    """Compiles the step of each kind of batch; writes the compiled programs into the folder `hlo`.

    Raises:
      ConfigError: As `build`.
    """
    program = build(config, topology)
    needed = _model_flops(config)
    steps = []
    for kind in program.abstract_batches:
        logger.info("compiling %s for %s", f"the step of {kind}" if kind else "the step", topology)
        steps.append(_compile(program, kind, needed[kind], hlo))
    return program, steps


def _model_flops(config: RunConfig) -> dict[str, float]:
    """FLOPs of each kind's step without recomputation and with unpadded attention.

    Traced for one device: how it is split does not change what the model needs.
    """
    plain = with_remat(dataclasses.replace(config, mesh=MeshConfig(max_devices=1)), "none")
    mesh = make_mesh(plain.mesh, jax.devices("cpu"))
    with trace_for("tpu"), prefer_backend("xla"), _unsaid_choices():
        program = build_program(plain, plain.make_stage(), mesh)
        return {
            kind: traced.count(program.train_step.trace(*program.step_arguments(kind)).jaxpr).total
            for kind in program.abstract_batches
        }


@contextlib.contextmanager
def _unsaid_choices() -> Iterator[None]:
    """Keeps the kernels that a trace for counting takes out of the log of choices."""
    log = logging.getLogger("iv2_jax.kernels.choice")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _compile(program: Program, kind: str, model_flops: float, hlo: Path | None) -> Step:
    """Compiles one kind's step; running out of memory is a finding, not an error."""
    arguments = program.step_arguments(kind)
    start = time.monotonic()
    with trace_for("tpu"):
        trace = program.train_step.trace(*arguments)
    asked = traced.count(trace.jaxpr)
    batch = program.abstract_batches[kind]
    held = held_bytes(program, kind)
    common: dict[str, Any] = {
        "kind": kind,
        "clips": next(iter(batch.values())).shape[0],
        "held": held,
        "model_flops": model_flops,
        "asked_flops": asked.total,
        "kernel_flops": sum(asked.kernels.values()),
    }
    compiled, failure = _try_compile(trace)
    if compiled is None:
        return Step(
            **common,
            temporaries=_wanted(failure),
            other=0,
            failure=failure,
            counted=None,
            compile_seconds=time.monotonic() - start,
        )
    memory = compiled.memory_analysis()
    # The compiler pads arguments to its tiles; what exceeds the plain sizes counts as other.
    padding = memory.argument_size_in_bytes - sum(held.values())
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Step(
        **common,
        temporaries=memory.temp_size_in_bytes,
        other=max(0, padding) + results + memory.generated_code_size_in_bytes,
        failure="",
        counted=_counted(compiled, program.mesh.size, hlo and hlo / f"{kind or 'step'}.txt"),
        compile_seconds=time.monotonic() - start,
    )


def _try_compile(trace: jax.stages.Traced) -> tuple[jax.stages.Compiled | None, str]:
    """The compiled step, or None and why there is not memory enough for it."""
    with described.quiet(), trace_for("tpu"):
        try:
            return trace.lower().compile(), ""
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None, str(error).split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")


def _counted(compiled: jax.stages.Compiled, devices: int, file: Path | None) -> Counted | None:
    """Sums over the compiled program; None where the compiler cannot print it."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # RET_CHECK on some asynchronous collectives
        logger.warning("the compiled program cannot be printed: %s", str(error).split("\n")[0])
        return None
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return count_lib.count(text, devices)


def _wanted(failure: str) -> int | None:
    """Bytes of temporaries that the compiler says it would have needed."""
    found = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", failure)
    return int(float(found.group(1)) * _SIZES[found.group(2)]) if found else None


def held_bytes(program: Program, kind: str) -> dict[str, int]:
    """Bytes that one device holds when a step starts, by what holds them."""
    state = program.abstract_state
    parts = {
        "parameters": state.params,
        "optimizer state": (state.opt_state, state.step),
        "moving average": state.ema,
        "frozen weights": program.abstract_frozen,
        "batch": program.abstract_batches[kind],
    }
    return {name: sum(map(_local_bytes, jax.tree.leaves(tree))) for name, tree in parts.items()}


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
