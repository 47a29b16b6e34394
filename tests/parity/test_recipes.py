"""Resizing and inflation on loading against the original's loaders."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

from iv2_jax.interop import recipes
from iv2_jax.models.video_encoder import EncoderConfig
from tests.parity import goldens

TABLE_LIMIT = 1e-6


def _encoders(table):
    """Encoders whose joint table may be (1, 1 + T*H*W, D), H = W: the header does not say T."""
    rows = table.shape[1] - 1
    sizes = {"depth": 1, "num_heads": 1, "mlp_width": 1, "pool_heads": 1, "patch_size": 1}
    for frames in range(1, rows + 1):
        side = math.isqrt(rows // frames)
        if frames * side * side == rows:
            yield EncoderConfig(width=table.shape[2], image_size=side, num_frames=frames, **sizes)


@pytest.mark.parametrize("group", ["s1_to_s2", "s2_to_clip", "s2_new"])
def test_stages(golden, group):
    case = golden("pos_interp")
    given, wanted = _group(case.inputs, group), _group(case.outputs, group)
    names = [name for name in given if "img" not in name]
    assert names

    def error(source, target):
        """Of the worst table; their names are the same but for a prefix."""
        return max(
            goldens.relative_error(
                recipes.resize_positions({"pos_embed": given[name]}, source, target)["pos_embed"],
                wanted[name],
            )
            for name in names
        )

    assert given.keys() == wanted.keys()
    pairs = itertools.product(_encoders(given[names[0]]), _encoders(wanted[names[0]]))
    assert min(error(source, target) for source, target in pairs) < TABLE_LIMIT


def test_tables_of_images_have_no_time(golden):
    """`orig_num_frames` of the stage-2 loader leaves them as they are."""
    case = golden("pos_interp")
    table = case.inputs["s2_new/a.img_pos_embed"]
    source = next(_encoders(table))
    target = dataclasses.replace(source, num_frames=7)
    ours = recipes.resize_positions({"img_pos_embed": table}, source, target)["img_pos_embed"]
    np.testing.assert_array_equal(ours, case.outputs["s2_new/a.img_pos_embed"])


def test_inflation(golden):
    case = golden("pos_interp")
    kernel = case.inputs["inflate/weight2d"].transpose(2, 3, 1, 0)
    names = [name for name in case.outputs if name.startswith("inflate/")]
    assert names
    for name in names:
        mode, tubelet = re.fullmatch(r"inflate/(\w+)_t(\d+)", name).groups()
        ours = recipes.inflate_patch_embed(kernel, int(tubelet), mode)
        goldens.assert_close(ours.transpose(4, 3, 0, 1, 2), case.outputs[name], TABLE_LIMIT, name)


def _group(tensors, group):
    """Tensors of a group, without its name."""
    return {k.removeprefix(f"{group}/"): v for k, v in tensors.items() if k.startswith(f"{group}/")}
