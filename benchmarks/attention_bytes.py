"""Bytes that attention moves to and from a TPU's memory, by kernel: compiled, not run.

    python benchmarks/attention_bytes.py                             # the table of docs/plan.md
    python benchmarks/attention_bytes.py --chips v5p --shapes 417x16x88 --kernels short xla

One attention, forward and backward, from queries, keys and values as a projection gives them,
`(clips, tokens, heads x head size)` in bfloat16, is compiled ahead of time for one chip; the
compiler lays arguments and results out as it likes. Bytes are what the compiled program's
instructions read and write (`iv2_jax.parallel.plan.count`), copies and transpositions among them;
"least" is queries, keys, values and the output's gradient read and the four results written, once
each pass. FLOPs are those that are asked for, padding included. No TPU is needed, but its compiler
is (`pip install 'iv2_jax[tpu]'`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

SHAPES = (
    "417x16x88",
    "417x25x128",
    "206x16x88",
    "257x25x128",
    "1024x16x88",
    "2049x16x88",
    "4097x16x88",
)
KERNELS = ("short", "splash", "xla")


def compile_case(chip: str, shape: str, kernel: str, clips: int) -> dict[str, Any]:
    """Compiles one attention and adds it up.

    Args:
        chip: 'v4', 'v5e', 'v5p', 'v6e' or 'v7x'.
        shape: tokens x heads x head size.
        kernel: attention backend.
        clips: rows.

    Returns:
        Figures of the compiled program; `error` alone where the kernel cannot do it.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from iv2_jax.models.attention import dot_product_attention
    from iv2_jax.parallel import described
    from iv2_jax.parallel.plan import count, traced

    tokens, heads, head_dim = map(int, shape.split("x"))
    edges = "1x1" if chip in ("v5e", "v6e") else "1x1x1"
    device = described.topology(f"{chip}:{edges}").devices()[:1]
    mesh = Mesh(np.asarray(device), ("data",))
    layout = Format(Layout.AUTO, NamedSharding(mesh, PartitionSpec()))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.reshape(clips, tokens, heads, head_dim) for x in (q, k, v))
        return dot_product_attention(q, k, v, backend=kernel).reshape(clips, tokens, -1)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> Any:
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(grad)

    x = jax.ShapeDtypeStruct((clips, tokens, heads * head_dim), jnp.bfloat16)
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh), described.quiet():
            trace = jax.jit(both, in_shardings=layout, out_shardings=layout).trace(x, x, x, x)
            compiled = trace.lower().compile()
    except ValueError as error:
        return {"error": str(error)}
    asked, sums = traced.count(trace.jaxpr), count.count(compiled.as_text(), 1)
    in_kernels = sum(asked.kernels.values())
    return {
        "gb": sums.bytes / 1e9,
        "least_gb": 11 * x.size * x.dtype.itemsize / 1e9,
        "temporary_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "tflop": (sums.flops + in_kernels) / 1e12,
        "kernels": dict(sums.kernels),
        "seconds": time.perf_counter() - start,
    }


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p", "v6e"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens x heads x head size")
    parser.add_argument("--kernels", nargs="+", default=KERNELS)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead")
    return parser.parse_args()


def main() -> int:
    """Prints the table."""
    args = parse()
    if not args.json:
        print("chip  tokens x heads x size  kernel    GB   least  temporary GB  TFLOP  compile s")
    for chip in args.chips:
        for shape in args.shapes:
            for kernel in args.kernels:
                case = compile_case(chip, shape, kernel, args.clips)
                if args.json:
                    print(json.dumps({"chip": chip, "shape": shape, "kernel": kernel} | case))
                elif "error" in case:
                    print(f"{chip:5} {shape:21} {kernel:7} {case['error']}")
                else:
                    print(
                        f"{chip:5} {shape:21} {kernel:7} {case['gb']:6.2f} {case['least_gb']:6.2f}"
                        f" {case['temporary_gb']:12.2f} {case['tflop']:7.3f} {case['seconds']:8.0f}"
                    )
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
