from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from iv2_jax.data import shots
from iv2_jax.errors import ConfigError
from iv2_jax.models.classifier import with_running_statistics
from iv2_jax.models.shots import ZOO, ShotConfig, ShotLayer, ShotNet, make_predict
from iv2_jax.models.shots.network import color_histogram

TINY = ZOO["test_tiny_shots"]


def _frames(length=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (2, length, TINY.frame_height, TINY.frame_width, 3)).astype("u1")


@pytest.fixture(scope="module")
def net():
    model = ShotNet(TINY)
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), _frames())["params"])
    return jax.jit(model.apply), {"params": params}


def test_shapes_and_that_float_frames_are_the_same(net):
    apply, variables = net
    out = apply(variables, _frames())
    assert out.single.shape == out.all.shape == (2, 8)
    assert out.single.dtype == jnp.float32
    again = apply(variables, _frames().astype(np.float32))
    np.testing.assert_allclose(out.single, again.single, atol=1e-6)


def test_a_frame_sees_no_further_than_its_neighbourhood(net):
    """Two layers reach 1 + ... + dilations 2 and 4 frames; the similarity reaches 2 beyond that."""
    apply, variables = net
    frames = _frames(40)
    changed = frames.copy()
    changed[:, 30:] = 255 - changed[:, 30:]
    a, b = (np.asarray(apply(variables, f).single) for f in (frames, changed))
    np.testing.assert_allclose(a[:, :22], b[:, :22], atol=1e-6)
    assert np.abs(a[:, 29:] - b[:, 29:]).max() > 1e-3


def test_histogram_counts_every_pixel_in_its_box():
    frames = np.zeros((1, 2, 3, 4, 3), np.uint8)
    frames[0, 0, 0, 0] = (255, 0, 32)  # red box 7, green box 0, blue box 1
    counts = np.asarray(color_histogram(jnp.asarray(frames)))
    assert counts.shape == (1, 2, 512)
    assert counts[0, 0, 7 * 64 + 1] == 1
    np.testing.assert_array_equal(counts.sum(-1), [[12, 12]])
    np.testing.assert_array_equal(counts[0, :, 0], [11, 12])


def test_training_moves_the_statistics_and_drops_features():
    model = ShotNet(TINY)
    variables = meta.unbox(jax.jit(model.init)(jax.random.key(0), _frames()))
    run = jax.jit(
        lambda v, x, key: model.apply(
            v, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )
    )
    out, moved = run(variables, _frames(), jax.random.key(1))
    other, _ = run(variables, _frames(), jax.random.key(2))
    assert np.abs(out.single - other.single).max() > 1e-4
    params = with_running_statistics(variables["params"], moved["batch_stats"])
    assert params["layer_0"]["norm"]["count"] == 1
    assert np.abs(params["layer_1"]["norm"]["mean"]).max() > 0


def test_a_long_video_is_judged_window_by_window(net):
    apply, variables = net
    frames = _frames(120)[0]
    single, every = shots.predict_video(make_predict(TINY, variables["params"]), frames)
    window = shots.window_frames(120)[1]  # frames 25..124, the middle 50..99
    out = apply(variables, frames[window][None])
    np.testing.assert_allclose(single[50:100], jax.nn.sigmoid(out.single[0, 25:75]), atol=1e-5)
    np.testing.assert_allclose(every[50:100], jax.nn.sigmoid(out.all[0, 25:75]), atol=1e-5)
    assert len(single) == 120


def test_frames_of_another_size_are_refused(net):
    apply, variables = net
    with pytest.raises(ValueError, match=r"\(2, 8, 6, 5, 3\) are not \(B, T, 5, 6, 3\)"):
        apply(variables, _frames().swapaxes(2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lookup": 4}, "lookup=4"),
        ({"hidden": 0}, "hidden=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"key_style": "other"}, "key_style='other'"),
        ({"layers": (ShotLayer(3, (2,)),)}, "do not pair up"),
        ({"layers": (ShotLayer(3, (2,)), ShotLayer(3, (3,)))}, "do not pair up"),
        ({"layers": (ShotLayer(1, (1,)),) * 8}, "names 6 layers"),
        ({"layers": (ShotLayer(1, (1,)),) * 6}, "halve frames to nothing"),
    ],
)
def test_config_errors_name_the_field(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **change)


def test_layer_errors():
    with pytest.raises(ConfigError, match="at least one branch"):
        ShotLayer(3, ())
    with pytest.raises(ConfigError, match="channels of at least 1"):
        ShotConfig((ShotLayer(0, (1,)), ShotLayer(1, (1,))))
