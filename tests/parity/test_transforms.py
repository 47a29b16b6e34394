"""Frame indices, crops, resize, view fusion and tube / random masks of the original code."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from iv2_jax.data import augment, augment_stage2, masking, sampling, sampling_stage2
from tests.parity.goldens import assert_close

_MEAN = np.array([0.485, 0.456, 0.406])
_STD = np.array([0.229, 0.224, 0.225])
_ONE_LEVEL = 1.01 / 255 / _STD.min()
_OFTEN = 400  # draws that should reach every outcome of a random rule


@pytest.fixture(scope="module")
def case(golden):
    return golden("transforms")


def _rows(case, name):
    rows = case.meta["cases"][name]
    assert rows
    return rows


def _views(case, sampler, name, key):
    """Compares a temporal rule with every recorded row that it should give."""
    for row in _rows(case, name):
        ours = sampler(row)
        if ours is not None:
            np.testing.assert_array_equal(ours, row[key], err_msg=str(row))


def test_sparse_indices(case):
    def ours(row):
        n, t = row["video_len"], row["clip_len"]
        if row["mode"] != "train":
            return sampling.segments_eval(n, t, row["chunk"], row["test_num_segment"])
        low, high = sampling.segment_ranges(n, t)
        assert [list(pair) for pair in zip(low, high, strict=True)] == row["ranges_inclusive"]
        legacy = random.Random(row["python_seed"])
        return [
            min(legacy.randint(a, b), n - 1)
            for a, b in zip(low.tolist(), high.tolist(), strict=True)
        ]

    _views(case, ours, "s1_sparse_get_seq_frames", "indices")


def test_sparse_training_draws_cover_the_recorded_ranges(case):
    for row in _rows(case, "s1_sparse_get_seq_frames"):
        if row["mode"] != "train":
            continue
        n, t = row["video_len"], row["clip_len"]
        rng = np.random.default_rng(0)
        drawn = np.stack([sampling.segments_train(n, t, rng) for _ in range(_OFTEN)])
        for i, (a, b) in enumerate(row["ranges_inclusive"]):
            assert set(drawn[:, i]) == set(range(a, min(b, n - 1) + 1))


def test_video_file_indices(case):
    for row in _rows(case, "s1_ssv2_indices"):
        n, t = row["video_len"], row["num_segment"]
        if row["mode"] == "validation":
            np.testing.assert_array_equal(sampling.video_validation(n, t), row["all_index"])
        elif row["mode"] == "test":
            for view, expected in enumerate(row["per_chunk"]):
                np.testing.assert_array_equal(sampling.video_test(n, t, view), expected)
        else:
            step = n // t
            draws = np.random.RandomState(row["numpy_seed"]).randint(max(step, 1), size=t)
            expected = np.arange(t) * step + (draws if step else 0)
            np.testing.assert_array_equal(expected, row["all_index"])
            rng = np.random.default_rng(0)
            drawn = np.stack([sampling.video_train(n, t, rng) for _ in range(_OFTEN)])
            assert (drawn // max(step, 1) == (np.arange(t) if step else 0)).all()


def test_dense_indices(case):
    def ours(row):
        n, t, stride = row["video_len"], row["clip_len"], row["stride"]
        if row["mode"] == "validation":
            return sampling.dense_validation(n, t, stride=stride, released=True)
        return sampling.dense_test(n, t, row["chunk"], row["test_num_segment"], stride=stride)

    _views(case, ours, "s1_dense_indices", "indices")


def test_pretraining_indices(case):
    for row in _rows(case, "s1_pretrain_sampling"):
        n, segments = row["video_len"], row["num_segments"]
        length, stride = row["new_length"], row["new_step"]
        window = sampling.pretrain_window(n, segments, length, stride)
        firsts = np.zeros(segments, np.int64)
        if window:
            draws = np.random.RandomState(row["numpy_seed"]).randint(window, size=segments)
            firsts = np.arange(segments) * window + draws
        np.testing.assert_array_equal(firsts + 1, row["offsets"])
        frames = sampling.expand_segments(firsts, n, length, stride)
        np.testing.assert_array_equal(frames, row["frame_ids"])


def test_stage2_indices(case):
    def ours(row):
        n, t, options = row["vlen"], row["num_frames"], row.get("kwargs", {})
        if row["sample"] == "middle":
            return sampling_stage2.middle(n, t, shift=options.get("fix_start"))
        if row["sample"].startswith("fps"):
            rate = float(row["sample"][3:])
            most = options.get("max_num_frames")
            return sampling_stage2.at_rate(n, options["input_fps"], rate, max_frames=most)
        np.testing.assert_array_equal(sampling_stage2.spread_edges(n, t), row["interval_edges"])
        rng = np.random.default_rng(0)
        drawn = sampling_stage2.spread_random(n, t, rng, released=True)
        assert len(drawn) == len(row["indices"])
        return None

    _views(case, ours, "s2_get_frame_indices", "indices")


def test_multiscale_crop_candidates(case):
    names = [n for n in case.meta["cases"] if n.startswith("s1_multiscale_crop_candidates")]
    assert names
    for name in names:
        size = int(re.search(r"out(\d+)$", name)[1])
        for row in _rows(case, name):
            width, height = row["image_wh"]
            ours = {
                (*crop, *corner)
                for crop in augment.crop_sizes(width, height, size)
                for corner in augment.crop_offsets(width, height, crop)
            }
            assert ours == set(map(tuple, row["crop_w_h_offx_offy"]))
            rng = np.random.default_rng(0)
            drawn = [augment.draw_crop(width, height, size, rng) for _ in range(_OFTEN)]
            assert {(w, h, x, y) for x, y, w, h in drawn} <= ours


def _normalised(frames):
    """(T, H, W, 3) uint8 as the recorded (3, T, H, W) float."""
    return ((frames / 255 - _MEAN) / _STD).transpose(3, 0, 1, 2)


@pytest.mark.parametrize("shape", ["landscape", "portrait"])
def test_resize_is_opencvs(case, shape):
    frames = case.inputs[f"crops/{shape}/frames_THWC"]
    resized = case.outputs[f"crops/{shape}/resized_THWC"]
    ours = augment.resize_short(frames, case.meta["cases"][f"{shape}_short_side"])
    np.testing.assert_array_equal(ours, resized)


@pytest.mark.parametrize("shape", ["landscape", "portrait"])
def test_test_crops(case, shape):
    settings = case.meta["cases"]
    size = settings[f"{shape}_short_side"]
    frames = case.inputs[f"crops/{shape}/frames_THWC"]
    found = 0
    for name, expected in case.outputs.items():
        match = re.fullmatch(rf"crops/{shape}/test_chunk(\d)_crop(\d)_CTHW", name)
        if not match:
            continue
        found += 1
        chosen = frames[settings[f"{shape}_chunk{match[1]}_indices"]]
        ours = augment.eval_views(chosen, size, num_crops=3)[int(match[2])]
        assert np.abs(_normalised(ours) - expected).max() < _ONE_LEVEL, name
    assert found == 6


@pytest.mark.parametrize("shape", ["landscape", "portrait"])
def test_single_crop_and_validation(case, shape):
    settings = case.meta["cases"]
    frames = case.inputs[f"crops/{shape}/frames_THWC"]
    short, crop = settings[f"{shape}_short_side"], settings[f"{shape}_validation_crop"]
    single = case.outputs[f"crops/{shape}/test_single_crop_CTHW"]
    validation = case.outputs[f"crops/{shape}/validation_CTHW"]
    middle = sampling.segments_eval(len(frames), validation.shape[1])
    ours = augment.eval_views(frames[middle], crop, short=short)[0]
    assert np.abs(_normalised(ours) - validation).max() < _ONE_LEVEL

    chosen = frames[sampling.segments_eval(len(frames), single.shape[1])]
    resized = augment.resize_short(chosen, short)
    rows, columns = augment.crop_window(*resized.shape[1:3], short)
    assert np.abs(_normalised(resized[:, rows, columns]) - single).max() < _ONE_LEVEL


@pytest.mark.parametrize("antialias", [True, False])
def test_stage2_pictures(case, antialias):
    """Spec stage2 8.5 and trap 11.8; every level of every pixel."""
    frames = case.inputs["s2_transform/frames_TCHW_uint8"].transpose(0, 2, 3, 1)
    expected = case.outputs[f"s2_transform/antialias_{antialias}"]
    ours = augment_stage2.stretch(frames, expected.shape[-1], antialias=antialias)
    normalised = _normalised(ours).transpose(1, 0, 2, 3)
    assert_close(normalised, expected, 1e-6, "stage-2 pictures")


def test_view_fusion(case):
    logits = case.inputs["fusion/view_logits"]
    expected = case.outputs["fusion/mean_softmax"]
    assert_close(augment.fuse_views(logits), expected, 1e-6, "fused views")


def test_tube_and_random_masks(golden):
    case = golden("masks")
    found = 0
    for i in range(10):
        settings = case.meta["cases"].get(f"window{i}")
        if settings is None:
            continue
        grid, ratio = tuple(settings["window_TxHxW"]), settings["ratio"]
        for kind, draw in (("tube", masking.tube_mask), ("random", masking.random_mask)):
            for source in ("s1", "s2"):
                expected = case.outputs[f"{kind}_{source}_{i}/mask"].astype(bool)
                rng = np.random.RandomState(settings["numpy_seed"])
                count = len(expected) if expected.ndim == 2 else 1
                ours = np.stack([draw(grid, ratio, rng) for _ in range(count)])
                np.testing.assert_array_equal(ours.reshape(expected.shape), expected)
                found += 1
    assert found
