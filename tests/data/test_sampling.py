"""Frame sampling: the spec's check values, and bounds for any counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iv2_jax.data import sampling, sampling_stage2
from iv2_jax.errors import ConfigError


def _ints(text):
    return [int(n) for n in text.split()]


def test_segments_check_values():  # spec stage1 7.2
    assert sampling.segments_eval(300, 8, 0, 4).tolist() == _ints("7 44 82 119 157 194 231 269")
    assert sampling.segments_eval(300, 8, 3, 4).tolist() == _ints("29 66 104 141 179 216 253 291")
    assert sampling.segments_eval(300, 8).tolist() == _ints("18 55 93 130 168 205 242 280")


def test_frame_folder_check_values():  # spec stage1 7.2
    assert sampling.frames_test(50, 8, 0, 2).tolist() == _ints("0 6 12 18 25 31 37 43")
    assert sampling.frames_test(50, 8, 1, 2).tolist() == _ints("3 9 15 21 28 34 40 46")


def test_hmdb_leaves_the_last_frame_out_of_the_division():
    assert sampling.frames_test(51, 8, 0, 2, hmdb=True).tolist() == _ints("0 6 12 18 25 31 37 43")


def test_frame_folders_pad_at_the_beginning():
    rng = np.random.default_rng(0)
    assert sampling.frames_train(3, 5, rng).tolist() == [0, 0, 0, 1, 2]
    assert sampling.frames_validation(3, 5).tolist() == [0, 0, 0, 1, 2]
    assert sampling.frames_validation(17, 4).tolist() == [2, 6, 10, 14]


def test_pretraining_takes_one_frame_of_every_segment():
    rng = np.random.default_rng(1)
    drawn = np.stack([sampling.pretrain(83, 8, rng) for _ in range(500)])
    for i in range(8):
        assert set(drawn[:, i]) == set(range(10 * i, 10 * i + 10))
    assert sampling.pretrain(7, 8, rng).tolist() == [0] * 8


def test_released_minus_one():
    assert sampling.released_minus_one(np.array([0, 5, 11]), 12).tolist() == [11, 4, 10]


def test_dense():
    rng = np.random.default_rng(0)
    drawn = [sampling.dense_train(100, 8, rng, stride=4) for _ in range(300)]
    assert all(d[-1] - d[0] == 31 for d in drawn)
    assert {int(d[0]) for d in drawn} == set(range(68))
    assert sampling.dense_validation(100, 8).tolist() == _ints("34 38 43 47 52 56 61 65")
    assert sampling.dense_test(100, 8).tolist() == list(range(34, 66, 4))
    assert sampling.dense_train(10, 8, rng).tolist() == [0, 9, 9, 9, 9, 9, 9, 9]


def test_spread_random_reaches_every_frame_unless_released():
    rng = np.random.default_rng(0)
    clean = np.stack([sampling_stage2.spread_random(12, 3, rng) for _ in range(300)])
    released = np.stack(
        [sampling_stage2.spread_random(12, 3, rng, released=True) for _ in range(300)]
    )
    assert set(clean.reshape(-1)) == set(range(12))
    assert set(released.reshape(-1)) == set(range(12)) - {3, 7, 11}


def test_rand_is_middle_in_evaluation_and_released_by_flag():
    for name in ("rand", "middle"):
        train, evaluate = sampling.rule(name)
        assert evaluate(100, 8, 0, 1).tolist() == _ints("5 18 30 43 55 68 80 93")
        released, same = sampling.rule(name, released=True)
        assert same(100, 8, 0, 1).tolist() == _ints("5 18 30 43 55 68 80 93")
        rng = np.random.default_rng(0)
        clean = {i for _ in range(300) for i in train(12, 3, rng).tolist()}
        faulty = {i for _ in range(300) for i in released(12, 3, rng).tolist()}
        assert clean == set(range(12))
        assert faulty == set(range(12)) - {3, 7, 11}


def test_released_middle_of_dense_is_by_flag():
    _, evaluate = sampling.rule("dense", released=True)
    assert evaluate(200, 8, 0, 1).tolist() == _ints("52 56 61 65 70 74 79 83")


def test_frames_at_a_rate():
    train, evaluate = sampling.rule("fps1", fps=25.0)
    rng = np.random.default_rng(0)
    assert evaluate(100, 4, 0, 1).tolist() == [12, 38, 62, 88]
    assert train(100, 4, rng).tolist() == [12, 38, 62, 88]
    assert evaluate(100, 2, 0, 1).tolist() == [12, 38]  # the first ones
    assert evaluate(100, 6, 0, 1).tolist() == [12, 38, 62, 88, 88, 88]
    assert evaluate(9, 3, 0, 1).tolist() == [4, 4, 4]  # shorter than half a second
    half = sampling.rule("fps0.5", fps=10.0)[1]
    assert half(100, 4, 0, 1).tolist() == [10, 30, 50, 70]
    sampling.rule("fps2")  # a name may be checked without a clip
    with pytest.raises(ConfigError, match="needs clips that have a frame rate"):
        sampling.rule("fps2")[1](100, 4, 0, 1)
    with pytest.raises(ConfigError, match="has one view, 2 are asked for"):
        sampling.rule("fps2", fps=25.0)[1](100, 4, 0, 2)
    for wrong in ("fps0", "fps-1", "fpsx", "fps", "fps1e3"):
        with pytest.raises(ConfigError, match=r"is not known.*fpsX"):
            sampling.rule(wrong)


@settings(max_examples=100, deadline=None)
@given(
    available=st.integers(1, 900),
    frames=st.integers(1, 20),
    fps=st.floats(0.5, 120),
    rate=st.sampled_from(["0.1", "0.5", "1", "4", "25", "1000"]),
)
def test_a_rate_stays_within_the_clip(available, frames, fps, rate):
    chosen = sampling.rule(f"fps{rate}", fps=fps)[1](available, frames, 0, 1)
    assert chosen.shape == (frames,)
    assert chosen.dtype == np.int64
    assert chosen.min() >= 0
    assert chosen.max() < available
    assert (np.diff(chosen) >= 0).all()


def test_annotated_range():
    # 100 frames, 4 of them: distance 24.75, the first at int(24.75 / 2).
    assert sampling.frame_range(50, 149, 4).tolist() == [62, 87, 112, 136]
    assert sampling.frame_range(50, 149, 4, num_available=100).tolist() == [62, 87, 99, 99]
    # At 25 frames a second the times 0.48, 1.48, 2.48, 3.44 s become 0, 1, 2, 3 s of the file.
    assert sampling.frame_range(0, 99, 4, fps=25, released=True).tolist() == [0, 25, 50, 75]
    assert sampling.frame_range(30, 129, 4, fps=25, released=True).tolist() == [30, 31, 50, 75]
    assert sampling.frame_range(250, 349, 4, fps=25, released=True).tolist() == _ints(
        "250 251 252 253"
    )
    with pytest.raises(ValueError, match="no frame"):
        sampling.frame_range(10, 9, 4)
    with pytest.raises(ValueError, match="needs the clip's frames per second"):
        sampling.frame_range(0, 9, 4, released=True)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(sampling.RULES)),
    available=st.integers(1, 400),
    frames=st.integers(1, 40),
    views=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_every_rule_stays_within_the_clip(name, available, frames, views, seed):
    train, evaluate = sampling.rule(name)
    picks = [train(available, frames, np.random.default_rng(seed))]
    picks += [evaluate(available, frames, view, views) for view in range(views)]
    for chosen in picks:
        assert chosen.shape == (frames,)
        assert chosen.dtype == np.int64
        assert chosen.min() >= 0
        assert chosen.max() < available
        assert (np.diff(chosen) >= 0).all()


def test_stride_of_the_dense_rule():
    train, evaluate = sampling.rule("dense", stride=2)
    assert evaluate(100, 4, 0, 1).tolist() == [46, 48, 51, 53]
    assert evaluate(100, 4, 1, 2).tolist() == [92, 94, 96, 98]
    chosen = train(100, 4, np.random.default_rng(0))
    assert chosen[-1] - chosen[0] == 7


def test_errors():
    with pytest.raises(ConfigError, match="did you mean 'segments'"):
        sampling.rule("segment")
    with pytest.raises(ValueError, match="at least 1"):
        sampling.segments_eval(0, 8)
    with pytest.raises(ValueError, match="views 0 and 1"):
        sampling.video_test(50, 8, 2)
