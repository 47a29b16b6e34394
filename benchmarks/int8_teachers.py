"""What rounding to int8 does to teachers: to their features on real clips, or to the compiled one.

    python benchmarks/int8_teachers.py features --config configs/demo/stage1.py \
        --config.eval_data.source=annotations.json --config.eval_data.prefix=DATA
    python benchmarks/int8_teachers.py compiled --topology v5p:1x1x1

`features` prints the cosines between features of the config's teachers (with `--run` of a stage-1
run's encoder) as they are, with weights rounded to bfloat16, and in int8, over the held-out clips.
`compiled` compiles two layers of InternVL-6B (bfloat16, 8 clips of 8 frames) ahead of time for a
TPU that need not be there.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from iv2_jax import config as config_lib
from iv2_jax.errors import UserError
from iv2_jax.models import teachers, zoo
from iv2_jax.models.teachers.base import Teacher, TeacherOutput
from iv2_jax.models.teachers.int8 import Int8Teacher
from iv2_jax.train import loop
from iv2_jax.train.checkpoint import load_params
from iv2_jax.train.distill import DistillConfig

KINDS = ("none", "weights", "products")


def cosines(exact: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Cosine of each vector of the last axis; of those that are nearly zero, none."""
    pair = [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (exact, found)]
    lengths = np.prod([np.linalg.norm(x, axis=-1) for x in pair], axis=0)
    kept = lengths > 1e-6
    return (pair[0] * pair[1]).sum(-1)[kept] / lengths[kept]


def fields(output: TeacherOutput) -> dict[str, np.ndarray]:
    """Named features with the vectors in the last axis: tokens layer by layer."""
    tokens = {f"tokens of layer {i}": np.asarray(x) for i, x in enumerate(output.tokens)}
    others = {"pooled": output.pooled, "saliency": output.saliency}
    return tokens | {name: np.asarray(x) for name, x in others.items() if x is not None}


def compare_features(config: DistillConfig, run: str) -> None:
    """Prints mean and least cosine of each feature of each teacher, or of a run's encoder."""
    stage = config.make_stage()
    videos = [batch["video"][batch["valid"]] for batch in stage.eval_batches()]
    if run:
        params, saved = load_params(run)
        options = {"encoder": saved["student"]["encoder"]}
        options["layers"] = list(range(options["encoder"]["depth"]))
        encoder = teachers.get("internvideo2_1b", options)
        _compare("encoder", encoder, params["encoder"], videos)
    else:
        for role in stage.teachers:
            given = dataclasses.replace(getattr(config, f"{role}_teacher"), int8="none")
            stride = config.frame_stride if role == "clip" else 1
            teacher = given.make()
            _compare(
                f"{role} {given.name}", teacher, teacher.load(), [v[:, ::stride] for v in videos]
            )
    print(f"{sum(map(len, videos))} clips")


def _compare(name: str, exact: Teacher, params: Any, videos: list[np.ndarray]) -> None:
    """Prints the cosines of one teacher."""
    half = jax.tree.map(
        lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)), params
    )
    variants: dict[str, tuple[Teacher, Any]] = {"bfloat16 weights": (exact, half)}
    for kind in KINDS[1:]:
        teacher = Int8Teacher(exact, products=kind == "products")
        variants[f"int8 {kind}"] = (teacher, teacher.rounded(params))
    expected = list(_run(exact, params, videos))
    for variant, (teacher, weights) in variants.items():
        found = list(_run(teacher, weights, videos))
        for feature in expected[0]:
            pairs = zip(expected, found, strict=True)
            values = np.concatenate([cosines(a[feature], b[feature]) for a, b in pairs])
            print(
                f"{name:30s} {variant:17s} {feature:18s} "
                f"mean {values.mean():.5f}  least {values.min():.5f}",
                flush=True,
            )


def _run(teacher: Teacher, params: Any, videos: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    """Features of every batch."""
    run = jax.jit(teacher)
    for video in videos:
        yield fields(run(params, video))


def compare_compiled(topology: str) -> None:
    """Prints bytes and products of two layers of InternVL-6B, compiled for one chip."""
    from iv2_jax.kernels.choice import trace_for
    from iv2_jax.parallel import described

    one = SingleDeviceSharding(described.topology(topology).devices()[0])
    half = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    encoder = config_lib.to_dict(zoo.get("internvl_6b"))
    encoder |= {"depth": 2, "scan_unroll": 2, "precision": half}
    for kind in KINDS:
        teacher = teachers.get("internvl_6b", {"encoder": encoder, "layers": [-1]}, int8=kind)
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
            jax.eval_shape(teacher.init, jax.random.key(0)),
        )
        video = jax.ShapeDtypeStruct((8, 8, 224, 224, 3), jnp.uint8, sharding=one)
        with trace_for("tpu"), described.quiet():
            compiled = jax.jit(teacher).trace(params, video).lower().compile()
        blocks = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["blocks"]))
        print(
            f"int8={kind:9s} blocks {blocks / 2**20:6.1f} MiB  "
            f"temporaries {compiled.memory_analysis().temp_size_in_bytes / 2**30:.2f} GiB  "
            f"memory traffic {compiled.cost_analysis()['bytes accessed'] / 1e9:.2f} GB  "
            f"products {products(compiled.as_text())}",
            flush=True,
        )


def products(text: str) -> dict[str, int]:
    """Matrix products of a compiled program by the dtypes of operands and result."""
    dtypes = dict(re.findall(r"%?([\w.\-]+) = (\w+)\[", text))
    found = re.findall(r"= (\w+)\[[^=]*? (?:convolution|dot)\(%?([\w.\-]+), %?([\w.\-]+)", text)
    counted = collections.Counter(
        f"{dtypes.get(a, '?')} x {dtypes.get(b, '?')} -> {out}" for out, a, b in found
    )
    return dict(counted)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("features", "compiled"))
    parser.add_argument("--config", default="configs/demo/stage1.py")
    parser.add_argument("--run", default="", help="its encoder is the teacher instead")
    parser.add_argument("--topology", default="v5p:1x1x1")
    args, overrides = parser.parse_known_args()
    try:
        if args.what == "compiled":
            compare_compiled(args.topology)
        else:
            config = loop.read_config(args.config, config_lib.split_overrides(overrides))
            compare_features(config, args.run)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
