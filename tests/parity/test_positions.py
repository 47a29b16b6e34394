"""Position tables and their resizing against the original's."""

from __future__ import annotations

import math
import re

import numpy as np

from iv2_jax.models import positions
from tests.parity import goldens

TABLE_LIMIT = 1e-6


def _numbers(name):
    """`sincos3d_d48_g4_t4_cls` -> {'d': 48, 'g': 4, 't': 4}."""
    return {key: int(value) for key, value in re.findall(r"_([a-z]+)(\d+)", name)}


def test_sincos_tables(golden):
    outputs = golden("pos_tables").outputs
    seen = set()
    for name, reference in outputs.items():
        kind, n = name.split("_")[0], _numbers(name)
        if kind == "sincos1d":
            table = positions.sincos_1d(n["d"], n["t"])
        elif kind == "sincos2d":
            table = positions.sincos_2d(n["d"], (n["g"], n["g"]))
        elif kind == "sincos3d":
            grid = (n["t"], n["g"], n["g"])
            table = positions.sincos_3d(n["d"], grid, has_cls=name.endswith("_cls"))
        else:
            continue
        seen.add(kind)
        assert table.dtype == np.float32
        goldens.assert_close(table[None], reference, TABLE_LIMIT, name)
    assert seen == {"sincos1d", "sincos2d", "sincos3d"}


def test_videomae_sinusoid_and_its_resizing(golden):
    outputs = golden("pos_tables").outputs
    names = [name for name in outputs if name.startswith("videomae_sinusoid")]
    assert names
    for name in names:
        n = _numbers(name)
        side = math.isqrt(n["n"] // n["frames"])
        table_frames = 8  # of the checkpoints this table is resized from
        table_side = math.isqrt(n["pre"] // table_frames)
        table = positions.videomae_sinusoid(
            n["d"], (n["frames"], side, side), (table_frames, table_side, table_side)
        )
        goldens.assert_close(table[None], outputs[name], TABLE_LIMIT, name)


def test_fine_tuning_resize(golden):
    case = golden("pos_interp")
    names = [name for name in case.meta["cases"] if name.startswith("ft")]
    assert names
    for name in names:
        s = case.meta["cases"][name]
        ours = positions.resize_positions(
            case.inputs[f"{name}/pos_embed"],
            (s["frames_from"], s["grid_from"], s["grid_from"]),
            (s["frames_to"], s["grid_to"], s["grid_to"]),
        )
        goldens.assert_close(ours, case.outputs[f"{name}/pos_embed"], TABLE_LIMIT, name)


def test_separable_resize(golden):
    case = golden("pos_interp")
    names = [name for name in case.outputs if name.startswith("sep/")]
    assert names
    for name in names:
        kind, old, new = re.match(r"sep/(pos_embed_\w+?)_(\d+)to(\d+)", name).groups()
        old, new = int(old), int(new)
        grids = ((old, 1, 1), (new, 1, 1)) if "temporal" in kind else ((1, old, old), (1, new, new))
        ours = positions.resize_positions(case.inputs[f"sep/{kind}"], *grids, has_cls=False)
        goldens.assert_close(ours, case.outputs[name], TABLE_LIMIT, name)


def test_raw_interpolation(golden):
    """The one-axis matrices, on sizes that are no multiples of one another."""
    case = golden("pos_interp")
    image, sequence = case.inputs["op/image"], case.inputs["op/seq"]
    seen = set()
    for name, reference in case.outputs.items():
        match = re.match(r"op/(bicubic|bilinear|linear)_(\d+)(?:x(\d+))?$", name)
        if not match:
            continue
        kind, first, second = match.groups()
        seen.add(kind)
        weights = positions.cubic_weights if kind == "bicubic" else positions.linear_weights
        if kind == "linear":
            ours = sequence @ weights(sequence.shape[-1], int(first)).T
        else:
            rows = weights(image.shape[-2], int(first))
            ours = rows @ image @ weights(image.shape[-1], int(second)).T
        goldens.assert_close(ours, reference, TABLE_LIMIT, name)
    assert seen == {"bicubic", "bilinear", "linear"}
