"""Attention-guided masks against torch.multinomial's choice, exactly."""

from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.models import masking


@pytest.fixture(scope="module")
def cases(golden):
    case = golden("masks")
    return case, [name for name in case.meta["cases"] if name.startswith("per_")]


def _order(keys):
    return np.argsort(-np.asarray(keys), axis=-1, kind="stable")


def test_importance_order(cases):
    case, names = cases
    assert names
    for name in names:
        keys = masking.sampling_keys(case.inputs[f"{name}/attn"], case.inputs[f"{name}/exp_noise"])
        order = case.outputs[f"{name}/importance_order"]
        np.testing.assert_array_equal(_order(keys).reshape(order.shape), order, err_msg=name)


def test_visible_tokens(cases):
    case, names = cases
    for name in names:
        mask = case.outputs[f"{name}/mask"]
        settings = case.meta["cases"][name]
        scope = "frame" if name.startswith("per_frame") else "clip"
        length = settings["HW"] if scope == "frame" else settings["THW"]
        count = masking.num_visible(length, settings["ratio"])
        assert count == settings[f"visible_per_{scope}"]
        shape = (len(mask), -1, length)
        visible = masking.attention_guided_visible(
            case.inputs[f"{name}/attn"].reshape(shape),
            case.inputs[f"{name}/exp_noise"].reshape(shape),
            count,
            scope=scope,
        )
        assert visible.dtype == np.int32
        np.testing.assert_array_equal(visible, masking.mask_to_visible(mask), err_msg=name)
