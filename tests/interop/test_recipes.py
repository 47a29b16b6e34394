"""Composite loads: what each takes, drops, resizes and refuses; resizing against PyTorch."""

from __future__ import annotations

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.interop import recipes
from iv2_jax.models import positions, zoo
from iv2_jax.models.classifier import ClassifierConfig
from iv2_jax.models.student import AlignmentConfig, StudentConfig

ENCODER = dataclasses.replace(zoo.get("test_tiny"), depth=2, num_frames=8, image_size=28)
CLIP = AlignmentConfig(40, (-2, -1), "linear", has_cls=True)
STAGE1 = StudentConfig(ENCODER, CLIP, AlignmentConfig(36, (-1,), "mlp", False), 20, "linear")
CLASSIFIER = ClassifierConfig(ENCODER, 7)


def _encoder(**fields):
    return dataclasses.replace(ENCODER, **fields)


STAGE2 = StudentConfig(_encoder(num_frames=4, image_positions="own"), CLIP, None, 20, "linear")


def _params(config, seed=0):
    rng = np.random.default_rng(seed)
    abstract = zoo.abstract_params(config)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract)


def _flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def _assert_same(ours, theirs, but=()):
    """Leaves of `ours` are those of `theirs`, but for the paths named."""
    ours, theirs = _flat(ours), _flat(theirs)
    for path, value in ours.items():
        if path not in but:
            np.testing.assert_array_equal(value, theirs[path], err_msg=path)


def test_pretrained_to_classifier():
    params, fresh = _params(STAGE1), _params(CLASSIFIER, seed=1)
    out = recipes.pretrained_to_classifier(params, STAGE1, CLASSIFIER, fresh)
    _assert_same(out["encoder"], params["encoder"])
    _assert_same({k: out[k] for k in ("fc_norm", "head")}, fresh)
    assert out.keys() == fresh.keys()


def test_pretrained_to_classifier_of_more_frames():
    target = dataclasses.replace(CLASSIFIER, encoder=_encoder(num_frames=16))
    params = _params(STAGE1)
    out = recipes.pretrained_to_classifier(params, STAGE1, target, _params(target, seed=1))
    _assert_same(out["encoder"], params["encoder"], but=["pos_embed"])
    table, old = out["encoder"]["pos_embed"], params["encoder"]["pos_embed"]
    np.testing.assert_array_equal(table[:, 0], old[:, 0])
    grid, old = table[0, 1:].reshape(16, 4, -1), old[0, 1:].reshape(8, 4, -1)
    np.testing.assert_allclose(grid[0], old[0], rtol=1e-6)  # clamped at the border
    np.testing.assert_allclose(grid[1], 0.75 * old[0] + 0.25 * old[1], rtol=1e-5, atol=1e-6)


def test_eight_to_four_frames_averages_pairs():
    out = recipes.fit_encoder(_params(ENCODER), ENCODER, _encoder(num_frames=4))
    old = _params(ENCODER)["pos_embed"][0, 1:].reshape(4, 2, 4, -1)
    new = out["pos_embed"][0, 1:].reshape(4, 4, -1)
    np.testing.assert_allclose(new, old.mean(axis=1), rtol=1e-5, atol=1e-6)


def test_a_wrong_source_is_refused():
    params = _params(STAGE1)
    fresh = _params(CLASSIFIER)
    missing = {k: v for k, v in params.items() if k != "mae_pos_embed"}
    with pytest.raises(CheckpointError, match="mae_pos_embed is missing"):
        recipes.pretrained_to_classifier(missing, STAGE1, CLASSIFIER, fresh)
    extra = {**params, "temp": np.zeros(())}
    with pytest.raises(CheckpointError, match="temp is left over"):
        recipes.pretrained_to_classifier(extra, STAGE1, CLASSIFIER, fresh)
    wrong = {**params, "mae_pos_embed": params["clip_pos_embed"]}
    with pytest.raises(CheckpointError, match=r"mae_pos_embed is \(1, 33, 32\), \(1, 32, 32\)"):
        recipes.pretrained_to_classifier(wrong, STAGE1, CLASSIFIER, fresh)
    other = dataclasses.replace(CLASSIFIER, encoder=_encoder(mlp_width=96, qk_norm=False))
    with pytest.raises(ConfigError, match="mlp_width 64 and 96, qk_norm True and False"):
        recipes.pretrained_to_classifier(params, STAGE1, other, fresh)
    with pytest.raises(CheckpointError, match=r"head/kernel is \(24, 7\), \(24, 9\)"):
        recipes.pretrained_to_classifier(
            params, STAGE1, dataclasses.replace(CLASSIFIER, num_classes=9), fresh
        )


def test_overlay_of_stage_two():
    target = dataclasses.replace(CLASSIFIER, encoder=_encoder(num_frames=16))
    stage1, stage2, fresh = _params(STAGE1), _params(STAGE2, 1), _params(target, 2)
    out = recipes.stage2_overlay_to_classifier(stage1, STAGE1, stage2, STAGE2, target, fresh)
    _assert_same(out["encoder"], stage2["encoder"], but=["pos_embed"])
    wanted = positions.resize_positions(stage2["encoder"]["pos_embed"], (4, 2, 2), (16, 2, 2))
    np.testing.assert_array_equal(out["encoder"]["pos_embed"], wanted)
    _assert_same(out["head"], fresh["head"])


def test_rows_of_another_head():
    source = dataclasses.replace(CLASSIFIER, num_classes=11)
    target = dataclasses.replace(CLASSIFIER, num_classes=3)
    params, rows = _params(source), [10, 0, 4]
    out = recipes.classifier_to_classifier(params, source, target, rows=rows)
    np.testing.assert_array_equal(out["head"]["bias"], params["head"]["bias"][rows])
    for j, row in enumerate(rows):
        np.testing.assert_array_equal(out["head"]["kernel"][:, j], params["head"]["kernel"][:, row])
    _assert_same(out["encoder"], params["encoder"])
    first = recipes.classifier_to_classifier(params, source, target, rows=range(3))
    np.testing.assert_array_equal(first["head"]["bias"], params["head"]["bias"][:3])


def test_rows_that_do_not_fit():
    source = dataclasses.replace(CLASSIFIER, num_classes=11)
    params = _params(source)
    with pytest.raises(ConfigError, match="2 rows for num_classes=7"):
        recipes.classifier_to_classifier(params, source, CLASSIFIER, rows=[0, 1])
    with pytest.raises(ConfigError, match=r"rows \[11, -1\] are not in the head.* 11 classes"):
        recipes.select_classes(params, [0, 11, -1])
    with pytest.raises(ConfigError, match="both given"):
        recipes.classifier_to_classifier(
            params, source, CLASSIFIER, rows=range(7), fresh=_params(CLASSIFIER)
        )
    with pytest.raises(CheckpointError, match=r"head/bias is \(11,\), \(7,\)"):
        recipes.classifier_to_classifier(params, source, CLASSIFIER)


def test_fresh_head():
    source = dataclasses.replace(CLASSIFIER, num_classes=11)
    params, fresh = _params(source), _params(CLASSIFIER, seed=1)
    out = recipes.classifier_to_classifier(params, source, CLASSIFIER, fresh=fresh)
    _assert_same(out["head"], fresh["head"])
    _assert_same({k: v for k, v in out.items() if k != "head"}, params)


def test_stage_one_to_two():
    params = _params(STAGE1)
    out = recipes.stage1_to_stage2_vision(params, STAGE1, STAGE2)
    tables = ("pos_embed", "img_pos_embed")
    _assert_same(out["encoder"], params["encoder"], but=tables)
    for name in ("clip_decoder", "final_clip_decoder"):
        _assert_same(out[name], params[name])
    for ours, theirs in (
        (out["encoder"]["pos_embed"], params["encoder"]["pos_embed"]),
        (out["clip_pos_embed"], params["clip_pos_embed"]),
    ):
        np.testing.assert_array_equal(
            ours, positions.resize_positions(theirs, (8, 2, 2), (4, 2, 2))
        )
    fresh = positions.sincos_3d(ENCODER.width, (1, 2, 2), has_cls=True)[None]
    np.testing.assert_array_equal(out["encoder"]["img_pos_embed"], fresh)
    np.testing.assert_array_equal(out["clip_img_pos_embed"], fresh)
    assert not any(path.startswith("mae_") for path in _flat(out))


def test_stage_one_to_two_with_shared_positions():
    """The 6B has no tables for images."""
    target = dataclasses.replace(STAGE2, encoder=_encoder(num_frames=4, image_positions="shared"))
    out = recipes.stage1_to_stage2_vision(_params(STAGE1), STAGE1, target)
    assert not [path for path in _flat(out) if "img" in path]


def test_stage_two_to_clip():
    params = _params(STAGE2)
    target = _encoder(image_positions="shared")
    out = recipes.student_to_clip_vision(params, STAGE2, target)
    _assert_same(out, params["encoder"], but=["pos_embed"])
    np.testing.assert_array_equal(
        out["pos_embed"],
        positions.resize_positions(params["encoder"]["pos_embed"], (4, 2, 2), (8, 2, 2)),
    )
    assert "img_pos_embed" not in out


def test_stage_two_to_chat():
    params = _params(STAGE2)
    target = _encoder(depth=1, pool=False, image_positions="own")
    out = recipes.student_to_chat_vision(params, STAGE2, target)
    first = jax.tree.map(lambda x: x[:1], params["encoder"]["blocks"])
    _assert_same(out["blocks"], first)
    np.testing.assert_array_equal(out["img_pos_embed"], params["encoder"]["img_pos_embed"])
    assert out["pos_embed"].shape == (1, 33, 32)
    assert "pool" not in out


def test_a_cut_leaves_things_out_only():
    params = _params(ENCODER)
    with pytest.raises(ConfigError, match="depth=3"):
        recipes.cut_encoder(params, ENCODER, _encoder(depth=3))
    with pytest.raises(ConfigError, match="num_frames 8 and 4"):
        recipes.cut_encoder(params, ENCODER, _encoder(depth=1, num_frames=4))
    without = recipes.cut_encoder(params, ENCODER, _encoder(pool=False))
    assert params.keys() - without.keys() == {"pool"}
    with pytest.raises(ConfigError, match="pool=True"):
        recipes.cut_encoder(without, _encoder(pool=False), ENCODER)


def test_separable_tables_are_resized():
    source = _encoder(separable_positions=True)
    target = _encoder(separable_positions=True, num_frames=16, image_size=42)
    params = _params(source)
    out = recipes.resize_positions({"encoder": params}, source, target)["encoder"]
    tables = ("pos_embed_spatial", "pos_embed_temporal")
    _assert_same(out, params, but=tables)
    for name, old, new in (
        (tables[0], (1, 2, 2), (1, 3, 3)),
        (tables[1], (8, 1, 1), (16, 1, 1)),
    ):
        wanted = positions.resize_positions(params[name], old, new, has_cls=False)
        np.testing.assert_array_equal(out[name], wanted)


def test_equal_sizes_change_nothing():
    params = _params(STAGE2)
    _assert_same(recipes.resize_positions(params, STAGE2.encoder, STAGE2.encoder), params)


def test_a_table_of_another_size_is_refused():
    with pytest.raises(ConfigError, match=r"\(1, 33, 32\) does not fit grid \(4, 2, 2\)"):
        recipes.resize_positions(_params(ENCODER), _encoder(num_frames=4), ENCODER)
    with pytest.raises(ConfigError, match="no position table"):
        recipes.resize_positions({"head": np.zeros(2)}, ENCODER, _encoder(num_frames=4))


def test_bfloat16_tables_keep_their_dtype():
    params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), _params(ENCODER))
    out = recipes.fit_encoder(params, ENCODER, _encoder(num_frames=16, image_size=42))
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_inflated_kernels_answer_a_still_clip_alike(tubelet):
    kernel = np.random.default_rng(0).normal(size=(1, 2, 2, 3, 5)).astype(np.float32)
    for mode in recipes.INFLATIONS:
        inflated = recipes.inflate_patch_embed(kernel, tubelet, mode)
        assert inflated.shape == (tubelet, 2, 2, 3, 5)
        np.testing.assert_allclose(inflated.sum(axis=0), kernel[0], rtol=1e-6)
        np.testing.assert_array_equal(
            inflated, recipes.inflate_patch_embed(kernel[0], tubelet, mode)
        )


def test_inflation_refuses():
    kernel = np.zeros((2, 4, 4, 3, 5), np.float32)
    with pytest.raises(ConfigError, match="mode='last'"):
        recipes.inflate_patch_embed(kernel[:1], 2, "last")
    with pytest.raises(ConfigError, match="not that of a single frame"):
        recipes.inflate_patch_embed(kernel, 2)
    with pytest.raises(ConfigError, match="tubelet=0"):
        recipes.inflate_patch_embed(kernel[:1], 0)
