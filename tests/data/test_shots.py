from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.data import shots
from iv2_jax.errors import ConfigError


@pytest.mark.parametrize("length", [1, 49, 50, 51, 100, 237])
def test_windows_are_the_padded_video_cut_with_a_stride(length):
    """25 copies of the first frame, the video, copies of the last up to a whole window."""
    tail = 25 + (50 - length % 50 if length % 50 else 0)
    padded = np.concatenate([np.zeros(25), np.arange(length), np.full(tail, length - 1)])
    windows = [padded[i : i + 100] for i in range(0, len(padded) - 99, 50)]
    np.testing.assert_array_equal(shots.window_frames(length), windows)


@pytest.mark.parametrize("length", [1, 50, 237])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_frame_is_judged_once_in_order(length, batch_size):
    shapes = set()

    def predict(windows):
        """Logits that are the frame's number, which the pixels hold."""
        shapes.add(windows.shape)
        number = windows[:, :, 0, 0, 0] + 256.0 * windows[:, :, 0, 0, 1]
        return number / 64, -number / 64

    number = np.arange(length)
    frames = np.stack([number % 256, number // 256, number * 0], -1).astype(np.uint8)
    single, every = shots.predict_video(predict, frames[:, None, None], batch_size=batch_size)
    expected = 1 / (1 + np.exp(-number / 64))
    np.testing.assert_allclose(single, expected, atol=1e-6)
    np.testing.assert_allclose(every, 1 - expected, atol=1e-6)
    assert shapes == {(batch_size, 100, 1, 1, 3)}  # a compiled function is compiled once


def test_logits_of_any_size_do_not_overflow():
    with np.errstate(all="raise"):
        values = shots._sigmoid(np.array([-1e4, 0.0, 1e4], np.float32))
    np.testing.assert_array_equal(values, [0.0, 0.5, 1.0])


def _walk(cut):
    """Scenes by the original's walk over frames."""
    found, start, before = [], 0, 0
    for i, now in enumerate(cut):
        if before == 1 and now == 0:
            start = i
        if before == 0 and now == 1 and i != 0:
            found.append([start, i])
        before = now
    if not cut[-1]:
        found.append([start, len(cut) - 1])
    return found or [[0, len(cut) - 1]]


def test_scenes_are_those_of_the_walk():
    for length in range(1, 9):
        for bits in range(2**length):
            cut = [(bits >> i) & 1 for i in range(length)]
            np.testing.assert_array_equal(shots.scenes(np.array(cut, float)), _walk(cut))


def test_threshold_is_strict():
    np.testing.assert_array_equal(shots.scenes([0.1, 0.5, 0.1]), [[0, 2]])
    np.testing.assert_array_equal(shots.scenes([0.1, 0.5, 0.1], 0.296), [[0, 1], [2, 2]])


def test_nothing_is_refused():
    with pytest.raises(ConfigError, match="num_frames=0"):
        shots.window_frames(0)
    with pytest.raises(ConfigError, match="probabilities"):
        shots.scenes([])
    with pytest.raises(ConfigError, match="batch_size=0"):
        shots.predict_video(lambda x: (x, x), np.zeros((3, 1, 1, 3), np.uint8), batch_size=0)
