"""Memory of the contrastive loss and its gradient on many chips, by form of the loss.

    python benchmarks/contrastive_memory.py --json figures.json   # docs/numerics.md's table
    python benchmarks/contrastive_memory.py --forms ring --batches 32768 --topologies 4x4x4

Compiled ahead of time for TPU v5p slices that are only described, not run on hardware: needs the
TPU compiler (`pip install 'iv2_jax[tpu]'`), no TPU. Features come in split over the chips, as the
towers leave them; the gradients stay so. Figures are the compiler's temporary bytes of one chip,
that is, what the loss needs on top of the features and their gradients. A case takes some 10 s of
CPU time; those that the JSON file has already are not compiled again, so that a run that was cut
off goes on. Exit code 1 tells that the ring misses a goal: at most 40 MiB at 32768 rows on 64
chips, and within a tenth the same on 512 chips at the same rows a chip.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

GOAL_MIB = 40.0
GOAL_GROWTH = 0.1
WIDTH = 512
BATCHES = (4096, 32768, 65536)
TOPOLOGIES = ("4x4x4", "8x8x8")
FORMS = ("dense", "chunked", "ring")
KINDS = ("softmax", "sigmoid")
DTYPES = ("bfloat16", "float32")


def make_mesh(chip: str, topology: str, fsdp: int | None):
    """Mesh of a described slice."""
    from iv2_jax.parallel import described
    from iv2_jax.parallel.mesh import MeshConfig
    from iv2_jax.parallel.mesh import make_mesh as mesh_of

    fsdp = fsdp or math.prod(int(edge) for edge in topology.split("x")[1:])
    devices = described.topology(f"{chip}:{topology}").devices()
    return mesh_of(MeshConfig(data=-1, fsdp=fsdp), devices)


def measure(mesh, batch: int, form: str, kind: str, dtype: str, width: int = WIDTH) -> dict:
    """Compiles value and gradient; temporary bytes of a chip and the seconds it took."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from iv2_jax.objectives.contrastive import contrastive_loss
    from iv2_jax.parallel.described import quiet
    from iv2_jax.parallel.mesh import batch_sharding, replicated

    def array(shape: tuple[int, ...], dtype: str, sharding: NamedSharding):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    rows, whole = batch_sharding(mesh), replicated(mesh)
    features = array((batch, width), dtype, rows)
    scalar = array((), "float32", whole)

    def step(a, b, temperature, bias, ids, valid):
        def loss(a, b, temperature, bias):
            options = {"bias": bias} if kind == "sigmoid" else {}
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return contrastive_loss(
                    a, b, temperature, ids, valid=valid, form=form, kind=kind, **options
                )

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(a, b, temperature, bias)

    start = time.perf_counter()
    with quiet():
        compiled = (
            jax.jit(step, out_shardings=(whole, (rows, rows, whole, whole)))
            .lower(
                features,
                features,
                scalar,
                scalar,
                array((batch,), "int32", rows),
                array((batch,), "bool", rows),
            )
            .compile()
        )
    memory = compiled.memory_analysis()
    return {
        "chips": math.prod(mesh.shape.values()),
        "batch": batch,
        "form": form,
        "kind": kind,
        "dtype": dtype,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }


def table(figures: list[dict]) -> str:
    """Markdown: a row for each batch, number of chips, kind and dtype; a column for each form."""
    forms = [form for form in FORMS if any(f["form"] == form for f in figures)]
    lines = [
        "| global batch | chips | rows a chip | loss | features | " + " | ".join(forms) + " |",
        "|" + "---|" * (5 + len(forms)),
    ]
    keys = dict.fromkeys((f["batch"], f["chips"], f["kind"], f["dtype"]) for f in figures)
    for batch, chips, kind, dtype in keys:
        cells = []
        for form in forms:
            key = (batch, chips, kind, dtype, form)
            found = next((f for f in figures if _key(f) == key), None)
            cells.append(f"{found['temp_bytes'] / 2**20:.1f}" if found else "-")
        row = [f"{batch:,}".replace(",", " "), str(chips), str(batch // chips), kind, dtype, *cells]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _key(figure: dict) -> tuple:
    return tuple(figure[name] for name in ("batch", "chips", "kind", "dtype", "form"))


def misses(figures: list[dict]) -> list[str]:
    """What the ring misses of the goals."""
    found = {_key(f): f["temp_bytes"] for f in figures}
    said = []
    for (batch, chips, kind, dtype, form), size in found.items():
        name = f"{kind} {dtype} at {batch} rows on {chips} chips"
        if form != "ring":
            continue
        if (batch, chips) == (32768, 64) and size > GOAL_MIB * 2**20:
            said.append(f"{name}: {size / 2**20:.1f} MiB, goal {GOAL_MIB:.0f}")
        more = found.get((8 * batch, 8 * chips, kind, dtype, form))
        if more is not None and more > (1 + GOAL_GROWTH) * size:
            said.append(f"{name}: {more / size:.2f} times that on {8 * chips} chips")
    return said


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", default="v5p")
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument("--fsdp", type=int, help="size of this mesh axis; default: all but an edge")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    return parser.parse_args()


def main() -> int:
    """Compiles every case and prints the table of temporary MiB of a chip."""
    args = parse()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    figures = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    known = {_key(figure) for figure in figures}
    for topology in args.topologies:
        mesh = make_mesh(args.chip, topology, args.fsdp)
        chips = math.prod(mesh.shape.values())
        for case in itertools.product(args.batches, args.forms, args.dtypes, args.kinds):
            batch, form, dtype, kind = case
            if (batch, chips, kind, dtype, form) in known:
                continue
            figures.append(measure(mesh, batch, form, kind, dtype))
            size, seconds = (figures[-1][name] for name in ("temp_bytes", "compile_seconds"))
            print(f"{chips} chips, {case}: {size / 2**20:.1f} MiB, {seconds} s", file=sys.stderr)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(figures, indent=2) + "\n")
    figures.sort(key=lambda f: (f["chips"], f["batch"], f["dtype"], f["kind"]))
    print(f"temporary MiB of a {args.chip} chip, value and gradient, {WIDTH} features a row;")
    print("compiled ahead of time, not run on hardware")
    print(table(figures))
    said = misses(figures)
    print("\n".join(f"missed: {line}" for line in said) or "goals of the ring: met")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
