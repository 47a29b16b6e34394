"""Compiled bounds of the transformer stacks on TPU v5p, for each layer, ahead of time.

    python benchmarks/compiled_bounds.py --json bounds.json          # docs/plan.md's table
    python benchmarks/compiled_bounds.py 1b --remat dots --attention xla   # another form of a case

Compiled for slices that are only described, not run on hardware: needs the TPU compiler
(`pip install 'iv2_jax[tpu]'`), no TPU. A case is a stack of the package's own blocks in the form
that the shipped configs have (teachers: as `iv2_jax/models/teachers` runs them), with the options
of `parallel/tpu.py`, forward and backward unless it is a teacher, on the mesh named. Two programs
are compiled: the stack at a small depth as a scan of two turns, and the same without blocks; what
the second takes is subtracted.

optimal      the compiler's `optimal_seconds` of a layer; it counts the body of a loop once, so the
             body of the scan divided by its layers is a layer. Kernels written by hand, of which it
             says nothing, are added at half of the peak
useful bound FLOPs of the formula (4 w^2 + 2 w m products for each token, 2 N w for scores and
             mixing; three times that with the backward pass) at the peak, as a share of the time
cycles       the same by the cycles that the compiler writes beside each operation: darker
bytes        to and from HBM, kernels' operands included: as `iv2 plan` counts them, and as the
             compiler does
temp         temporaries of the whole small program

A case takes some 25 s of CPU time on a quiet core; those that the JSON file has already are not
compiled again. Exit code 1 tells that a case misses its goal.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TURNS = 2  # of the scan
KERNEL_SHARE_OF_PEAK = 0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """One stack on one mesh.

    Attributes:
        model: name in the zoo, or "videomaev2_g".
        rows: clips (of teachers of pictures: frames) of a chip.
        tokens: of a clip or frame.
        topology: slice.
        fsdp: devices that share a copy of the parameters.
        train: forward and backward, or forward only.
        remat: what the backward pass recomputes.
        unroll: layers in one turn of the scan.
        features: outputs of so many blocks are collected.
        goal: id of the goal.
        target: least useful bound, in percent; 0 for none.
        max_bytes: most HBM bytes of a layer, 0 for no goal.
        max_temp: most temporary bytes of two layers, 0 for no goal.
    """

    model: str
    rows: int
    tokens: int
    topology: str = "v5p:4x4x4"
    fsdp: int = 64
    train: bool = True
    remat: str = "named"
    unroll: int = 1
    features: int = 2
    goal: str = ""
    target: float = 0.0
    max_bytes: float = 0.0
    max_temp: float = 0.0


_TEACHER = {"topology": "v5p:1x1x1", "fsdp": 1, "train": False, "remat": "none"}
CASES = {
    "1b": Case("internvideo2_1b", 32, 417, goal="P2, P7", target=55, max_bytes=10e9),
    # As fine-tuning runs it: only the last block's output is used.
    "1b_long": Case(
        "internvideo2_1b", 8, 2049, features=0, goal="P3", target=55, max_temp=2.5 * 2**30
    ),
    "6b": Case("internvideo2_6b", 8, 417, goal="P4", target=60),
    "internvl": Case("internvl_6b", 64, 257, **_TEACHER, goal="P5", target=75),
    "videomae": Case("videomaev2_g", 32, 2048, **_TEACHER),
    "videomae_last": Case(
        "videomaev2_g", 32, 2048, **_TEACHER, features=0, goal="P6", max_temp=1.6 * 2**30
    ),
}


def config_of(case: Case) -> Any:
    """The model's config at a depth of `TURNS` turns."""
    from iv2_jax.models import zoo
    from iv2_jax.models.layers import Precision

    config = zoo.get(case.model)
    params = "float32" if case.train else "bfloat16"
    common = {"depth": TURNS * case.unroll, "precision": Precision(params, "bfloat16")}
    if case.model == "videomaev2_g":
        return dataclasses.replace(config, **common)
    rate = 0.25 if case.train else 0.0
    form = {"remat": case.remat, "scan_unroll": case.unroll}
    return dataclasses.replace(config, drop_path_rate=rate, pool=False, **form, **common)


def layer_flops(case: Case) -> float:
    """FLOPs of one layer and chip by the formula."""
    config = config_of(case)
    w, m = config.width, config.mlp_width
    tokens = case.rows * case.tokens
    forward = 2 * tokens * (4 * w * w + 2 * w * m) + 4 * tokens * case.tokens * w
    return (3 if case.train else 1) * forward


def traced(case: Case, mesh: Any, *, blocks: bool) -> Any:
    """The traced program: the stack, or what is around it."""
    import jax
    import jax.numpy as jnp
    from flax.core import meta
    from jax.sharding import NamedSharding, PartitionSpec

    from iv2_jax.kernels.choice import trace_for
    from iv2_jax.models.teachers.videomae import VideoMAE
    from iv2_jax.models.video_encoder import VideoEncoder
    from iv2_jax.parallel import rules
    from iv2_jax.parallel.mesh import BATCH_AXES, batch_sharding, replicated

    config = config_of(case)
    model = VideoMAE(config) if case.model == "videomaev2_g" else VideoEncoder(config)
    layers = tuple(range(-case.features, 0))  # none: only the last block's output is used
    rows, whole = batch_sharding(mesh), replicated(mesh)

    def run(variables: Any, x: Any, **kwargs: Any) -> Any:
        return model.apply(variables, x, return_layers=layers, method="run_blocks", **kwargs)

    def init(key: jax.Array) -> Any:
        x = jnp.zeros((1, 8, config.width), jnp.bfloat16)
        return model.init(key, x, return_layers=layers, method="run_blocks")["params"]

    boxed = jax.eval_shape(init, jax.random.key(0))
    shardings, _ = rules.shardings(boxed, mesh)
    params = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        meta.unbox(boxed),
        shardings,
    )
    shape = (case.rows * mesh.size, case.tokens, config.width)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rows)

    def forward(params: Any, x: Any, key: Any) -> Any:
        if not blocks:
            return x + jnp.ones((), x.dtype), jnp.stack([x * 2] * case.features) if layers else None
        kwargs = {"train": True, "rngs": {"droppath": key}} if case.train else {}
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run({"params": params}, x, **kwargs)

    def loss(params: Any, x: Any, key: Any) -> Any:
        outs = forward(params, x, key)
        return sum(jnp.mean(jnp.square(out.astype(jnp.float32))) for out in jax.tree.leaves(outs))

    if case.train:
        step = jax.value_and_grad(loss, argnums=(0, 1) if blocks else 1)
        out = (whole, (shardings, rows) if blocks else rows)
    else:
        step = forward
        out = (rows, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)) if layers else None)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole)
    with trace_for("tpu"):
        return jax.jit(step, out_shardings=out).trace(params, x, key)


def compiled(case: Case, mesh: Any, *, blocks: bool, hlo: Path | None = None) -> dict[str, Any]:
    """Figures of a whole small program, of one chip."""
    from iv2_jax.kernels.choice import trace_for
    from iv2_jax.parallel.described import quiet, topology
    from iv2_jax.parallel.plan import count, hardware
    from iv2_jax.parallel.plan import traced as traced_lib
    from iv2_jax.parallel.tpu import compiler_options

    start = time.perf_counter()
    trace = traced(case, mesh, blocks=blocks)
    with quiet(), trace_for("tpu"):
        program = trace.lower().compile(compiler_options(mesh))
    text = program.as_text()
    if hlo is not None:
        hlo.write_text(text)
    device = hardware.device(topology(case.topology).chip)
    counted = count.count(text, mesh.size)
    costs = program.cost_analysis()
    return {
        "optimal_seconds": costs["optimal_seconds"],
        "compiler_bytes": costs["bytes accessed"],
        "bytes": counted.bytes,
        "flops": counted.flops,
        "cycle_seconds": counted.cycles / device.clock,
        "kernel_flops": sum(traced_lib.count(trace.jaxpr).kernels.values()) / mesh.size,
        "temp": program.memory_analysis().temp_size_in_bytes,
        "code": program.memory_analysis().generated_code_size_in_bytes,
        "collectives": {
            kind: sum(t.payload for c, t in counted.collectives.items() if c.kind == kind)
            for kind in sorted({c.kind for c in counted.collectives})
        },
        "compile_seconds": time.perf_counter() - start,
    }


def measure(case: Case, hlo: Path | None = None) -> dict[str, Any]:
    """Figures of one layer of a case, of one chip."""
    from iv2_jax.parallel.described import topology
    from iv2_jax.parallel.mesh import MeshConfig, make_mesh
    from iv2_jax.parallel.plan import hardware

    slices = topology(case.topology)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=case.fsdp), slices.devices())
    whole = compiled(case, mesh, blocks=True, hlo=hlo)
    rest = compiled(case, mesh, blocks=False)
    peak = hardware.device(slices.chip).peak
    depth, useful = TURNS * case.unroll, layer_flops(case)

    def layer(name: str, times: int = depth) -> float:
        return (whole[name] - rest[name]) / times

    kernels = layer("kernel_flops") / (KERNEL_SHARE_OF_PEAK * peak)
    # The compiler's own sums count the scan's body once, ours as often as it turns.
    seconds = layer("optimal_seconds", case.unroll) + kernels
    return {
        "form": {"remat": case.remat, "unroll": case.unroll},
        "useful_flops": useful,
        "hardware_flops": layer("flops") + layer("kernel_flops"),
        "seconds": seconds,
        "kernel_seconds": kernels,
        "useful_bound": useful / peak / seconds,
        "cycle_seconds": layer("cycle_seconds") + kernels,
        "bytes": layer("bytes"),
        "compiler_bytes": layer("compiler_bytes", case.unroll),
        "temp": whole["temp"],
        "depth": depth,
        "collectives": {k: v / depth for k, v in whole["collectives"].items() if v / depth > 1e5},
        "compile_seconds": whole["compile_seconds"],
        "code": whole["code"],
    }


def misses(case: Case, figures: dict[str, Any]) -> list[str]:
    """Goals of a case that its figures miss."""
    checks: list[tuple[bool, str]] = [
        (100 * figures["useful_bound"] < case.target, f"useful bound below {case.target:g} %"),
        (0 < case.max_bytes < figures["bytes"], f"more than {case.max_bytes / 1e9:g} GB a layer"),
        (0 < case.max_temp < figures["temp"], f"more than {case.max_temp / 2**30:g} GiB"),
    ]
    return [f"{case.goal}: {text}" for missed, text in checks if missed]


def line(name: str, figures: dict[str, Any]) -> str:
    """One row of the table."""
    ratio = figures["hardware_flops"] / figures["useful_flops"]
    moved = " + ".join(f"{k} {v / 1e6:.0f} MB" for k, v in figures["collectives"].items())
    form = figures["form"]
    times = " ".join(
        f"{label} {1e3 * figures[f'{key}_seconds']:.2f}"
        for label, key in (("kernels", "kernel"), ("cycles", "cycle"))
    )
    return (
        f"{name} ({form['remat']}, unroll {form['unroll']}): "
        f"{figures['hardware_flops'] / 1e12:.3f} TF, hw / model {ratio:.2f}, "
        f"{1e3 * figures['seconds']:.2f} ms ({times}), "
        f"useful bound {100 * figures['useful_bound']:.1f} %, "
        f"{figures['bytes'] / 1e9:.2f} GB (compiler {figures['compiler_bytes'] / 1e9:.2f}), "
        f"temp {figures['temp'] / 2**30:.2f} GiB of {figures['depth']} layers, "
        f"{moved or 'no collectives'}, {figures['compile_seconds']:.0f} s"
    )


def main() -> int:
    """Measures the asked-for cases, prints and writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--remat", help="instead of the case's own")
    parser.add_argument("--unroll", type=int, help="layers in one turn of the scan")
    parser.add_argument("--fsdp", type=int, help="devices that share a copy of the parameters")
    parser.add_argument("--topology", help="slice, such as v5p:4x4x4")
    parser.add_argument("--attention", default="auto", help="attention kernel, see kernels/choice")
    parser.add_argument("--json", type=Path, help="file with the figures; has cases added")
    parser.add_argument("--hlo", type=Path, help="folder for the compiled programs")
    args = parser.parse_args()
    if args.hlo:
        args.hlo.mkdir(parents=True, exist_ok=True)
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from iv2_jax.kernels.choice import prefer_backend

    jax.config.update("jax_enable_compilation_cache", False)
    given = {n: getattr(args, n) for n in ("remat", "unroll", "fsdp", "topology")}
    changes = {name: value for name, value in given.items() if value is not None}
    suffix = "".join(f" {k}={v}" for k, v in changes.items())
    suffix += "" if args.attention == "auto" else f" attention={args.attention}"
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    missed: list[str] = []
    for name in args.cases or CASES:
        case = dataclasses.replace(CASES[name], **changes)
        label = name + suffix
        if label not in known:
            hlo = args.hlo and args.hlo / f"{label.replace(' ', '_')}.txt"
            forced: Callable[..., Any] = prefer_backend
            with forced(args.attention) if args.attention != "auto" else contextlib.nullcontext():
                known[label] = measure(case, hlo)
            if args.json:
                args.json.write_text(json.dumps(known, indent=1) + "\n")
        print(line(label, known[label]), flush=True)
        missed += [f"{label}: {text}" for text in misses(case, known[label])]
    for text in missed:
        print(f"missed: {text}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
