"""Classifier training: targets, mixing, erasing, the loss, what moves, the same on every mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from iv2_jax.data.augment import fuse_views
from iv2_jax.errors import ConfigError
from iv2_jax.parallel import described
from iv2_jax.parallel.mesh import make_mesh
from iv2_jax.parallel.plan.planning import make_plan
from iv2_jax.train import classify, classify_mixing, loop
from iv2_jax.train.classify_config import ErasingConfig, MixupConfig
from iv2_jax.train.program import build_program
from tests.train import tiny_classify

RECIPE = {"mixup": 0.8, "cutmix": 1.0}


def _softmax_loss(logits, targets):
    """Cross-entropy in NumPy, float64."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-(targets * log_p).sum(-1).mean())


def _smooth(labels, classes, smoothing=0.1):
    """Targets as spec stage1 7.4 words them."""
    targets = np.full((len(labels), classes), smoothing / classes)
    targets[np.arange(len(labels)), labels] = 1 - smoothing + smoothing / classes
    return targets


def _params(config):
    stage = config.make_stage()
    return stage, meta.unbox(jax.jit(stage.init_params)(jax.random.key(3)))


def _loss(stage, *, train):
    return jax.jit(functools.partial(stage.loss_fn, train=train))


@pytest.mark.parametrize("group", [0, 4], ids=["whole batch", "groups of 4"])
@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}, RECIPE], ids=str)
def test_rows_are_mixed_with_the_reversed_group_as_the_draw_says(kind, group):
    config = MixupConfig(**kind, group=group)
    rng = np.random.default_rng(0)
    video = rng.normal(size=(8, 2, 12, 20, 3)).astype(np.float32)
    targets = _smooth(rng.integers(0, 5, 8), 5).astype(np.float32)
    mix = jax.jit(functools.partial(classify_mixing.mix, config=config))
    mixed, soft = mix(video, targets, rng=jax.random.key(5))
    np.testing.assert_allclose(np.sum(soft, axis=1), 1.0, atol=1e-6)

    size = group or 8
    draw = classify_mixing.draw_mixing(config, jax.random.key(5), 8 // size, (12, 20))
    keep, own = np.repeat(draw.keep, size), np.repeat(draw.own, size, axis=0)
    partner = np.concatenate([np.arange(8)[i : i + size][::-1] for i in range(0, 8, size)])
    own = own[:, None, :, :, None]
    np.testing.assert_allclose(mixed, own * video + (1 - own) * video[partner], atol=1e-5)
    wanted = keep[:, None] * targets + (1 - keep[:, None]) * targets[partner]
    np.testing.assert_allclose(soft, wanted, atol=1e-6)


def test_draws_of_mixing():
    draw = functools.partial(classify_mixing.draw_mixing, groups=600, size=(16, 24))
    both = draw(MixupConfig(**RECIPE), jax.random.key(0))
    own, keep = np.asarray(both.own), np.asarray(both.keep)
    # What is left of a row's pixels is its share in the target, a pasted box at its real area.
    np.testing.assert_allclose(own.mean((1, 2)), keep, atol=1e-5)
    blends = own.min((1, 2)) == own.max((1, 2))
    boxes = ((own == 0) | (own == 1)).all((1, 2))
    assert np.all(blends | boxes)
    assert 0.4 < boxes.mean() < 0.6
    for box in own[boxes & ~blends]:
        outside = 1 - box
        np.testing.assert_array_equal(outside, outside.max(1)[:, None] * outside.max(0)[None])
    some = draw(MixupConfig(mixup=0.8, probability=0.25), jax.random.key(1))
    assert 0.18 < (np.asarray(some.keep) < 1).mean() < 0.32
    # Beta(0.8, 0.8): mean one half, variance 1 / (4 * 2.6).
    blend = np.asarray(draw(MixupConfig(mixup=0.8), jax.random.key(2)).keep)
    assert abs(blend.mean() - 0.5) < 0.05
    assert abs(blend.var() - 1 / 10.4) < 0.015


def test_erasing_puts_one_box_of_noise_into_all_frames():
    video = jnp.full((200, 2, 20, 28, 3), 7.0)
    config = ErasingConfig(probability=0.25)
    erase = jax.jit(functools.partial(classify_mixing.erase, config=config))
    noisy = np.asarray(erase(video, rng=jax.random.key(0)))
    erased = noisy != 7.0
    np.testing.assert_array_equal(erased[:, 0], erased[:, 1])
    hit = erased.any((1, 2, 3, 4))
    assert 0.17 < hit.mean() < 0.33
    for box in erased[hit, 0, :, :, 0]:
        rows, columns = box.any(1), box.any(0)
        np.testing.assert_array_equal(box, rows[:, None] & columns[None])
        assert 0.01 < box.mean() < 0.4
        assert 0.2 < rows.sum() / columns.sum() < 5
    noise = noisy[erased]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


@pytest.mark.parametrize(
    "mixup",
    [
        pytest.param({}, marks=pytest.mark.slow, id="plain"),
        pytest.param(RECIPE | {"group": 4}, id="mixed"),
    ],
)
def test_loss_is_the_reference_s(mixup):
    config = tiny_classify.config(mixup=mixup, batch_size=4, data={"views": 2})
    stage, params = _params(config)
    batch = tiny_classify.batch(4, views=2)
    loss, metrics = _loss(stage, train=True)(params, {}, batch, jax.random.key(1))

    encoder = config.classifier.encoder
    video = batch["video"].reshape(8, *batch["video"].shape[2:])
    video = (video / 255.0 - encoder.pixel_mean) / encoder.pixel_std
    targets = _smooth(np.repeat(batch["label"], 2), 3)
    if mixup:
        key = jax.random.split(jax.random.key(1), 4)[1]
        draw = classify_mixing.draw_mixing(config.mixup, key, 2, video.shape[2:4])
        own = np.repeat(draw.own, 4, axis=0)[:, None, :, :, None]
        keep = np.repeat(draw.keep, 4)[:, None]
        partner = [3, 2, 1, 0, 7, 6, 5, 4]
        video = own * video + (1 - own) * video[partner]
        targets = keep * targets + (1 - keep) * targets[partner]
    logits = jax.jit(stage.model.apply)({"params": params}, video.astype(np.float32))
    assert float(loss) == pytest.approx(_softmax_loss(logits, targets), rel=1e-5)
    if mixup:
        assert not metrics
    else:
        right = np.argmax(logits, 1) == np.repeat(batch["label"], 2)
        assert float(metrics["top1"]) == pytest.approx(100 * right.mean())


def test_views_are_averaged_as_probabilities_and_padding_does_not_count():
    config = tiny_classify.config(tiny_classify.model(num_classes=7))
    stage, params = _params(config)
    batch = tiny_classify.batch(6, views=3)
    batch["valid"] = np.array([True, True, False, True, True, False])
    loss, metrics = _loss(stage, train=False)(params, {}, batch, jax.random.key(0))
    encoder = config.classifier.encoder
    apply = jax.jit(stage.model.apply)
    views = np.asarray(encoder.normalize(batch["video"]))
    logits = [apply({"params": params}, views[:, v]) for v in range(3)]
    fused = fuse_views(np.stack(logits, axis=1))[batch["valid"]]
    labels = batch["label"][batch["valid"]]
    right = fused[np.arange(4), labels]
    assert float(loss) == pytest.approx(-np.log(right).mean(), rel=1e-5)
    rank = (fused > right[:, None]).sum(1)
    assert float(metrics["top1"]) == pytest.approx(100 * (rank < 1).mean())
    assert float(metrics["top5"]) == pytest.approx(100 * (rank < 5).mean())


def test_ties_count_against_the_right_class():
    scores = jnp.zeros((4, 9))
    found = classify.accuracy(scores, jnp.zeros(4, jnp.int32))
    assert {name: float(value) for name, value in found.items()} == {"top1": 0.0, "top5": 0.0}


def _steps(config, count=3):
    """Metrics of a few steps on the same clips, and what came of the parameters."""
    program = build_program(config, config.make_stage(), make_mesh(config.mesh))
    state = program.init(jax.random.key(0))
    before = jax.device_get(state.params)
    rows, views = config.batch_size, config.data.num_views
    batch = loop.to_device(tiny_classify.batch(rows, views), (), program.mesh)
    losses = []
    for _ in range(count):
        state, metrics = program.train_step(state, {}, batch, jax.random.key(1))
        losses.append(jax.device_get(metrics))
    flat = [
        {p: np.asarray(v) for p, v in traverse_util.flatten_dict(tree, sep="/").items()}
        for tree in (before, jax.device_get(state.params))
    ]
    return losses, *flat


@pytest.mark.slow
@pytest.mark.pod
def test_one_and_eight_devices_give_the_same_losses():
    changes = {
        "mixup": RECIPE | {"group": 4},
        "erasing": {"probability": 0.5},
        "data": {"views": 2},
        "accumulate": 2,
        "batch_size": 16,
    }
    model = tiny_classify.model(drop_path=0.2, dropout=0.2)
    one, _, params_one = _steps(tiny_classify.config(model, **changes))
    mesh = {"data": 2, "fsdp": 4}
    eight, _, params_eight = _steps(tiny_classify.config(model, **changes, mesh=mesh))
    assert len({float(m["loss"]) for m in one}) == 3
    for a, b in zip(one, eight, strict=True):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=name)
    for path, value in params_one.items():
        if not path.endswith("pool/k/bias"):  # no gradient but rounding noise
            np.testing.assert_allclose(params_eight[path], value, atol=2e-4, err_msg=path)


def test_a_probe_moves_head_and_pool_alone():
    optimizer = tiny_classify.values()["optimizer"]
    optimizer |= {"freeze": ["encoder/.*"], "open": ["encoder/pool/.*"]}
    _, before, after = _steps(tiny_classify.config(optimizer=optimizer), 2)
    moved = {path for path in before if np.any(before[path] != after[path])}
    kept = {path for path in before if path.startswith("encoder/") and "/pool/" not in path}
    assert not moved & kept
    assert {"head/kernel", "fc_norm/scale", "encoder/pool/v/kernel"} <= moved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"size": 56}}, r"data\.size must be the encoder's 28, not 56"),
        ({"data": {"num_frames": 8}}, r"data\.frames must be the encoder's 4, not 8"),
        ({"mixup": {"mixup": 0.8, "group": 3}}, r"mixup\.group 3 does not divide the 8 rows"),
        ({"accumulate": 3}, "accumulate 3 does not divide batch_size 8"),
        ({"classes": ["a", "b"]}, r"classes names 2, but classifier\.num_classes is 3"),
        ({"mixup": {"switch": 1.5}}, r"mixup\.switch must be from 0 to 1"),
    ],
)
def test_mistakes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_classify.config(**changes)


def test_running_statistics_are_refused():
    model = tiny_classify.model(head="cls_avg1", merge_norm="BN")
    with pytest.raises(ConfigError, match="keeps running statistics"):
        tiny_classify.config(model)


@pytest.mark.tpu
@pytest.mark.slow
@pytest.mark.pod
def test_the_recipe_compiles_for_a_slice():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'iv2_jax[tpu]'")
    model = tiny_classify.model(drop_path=0.1)
    model = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, remat="full"))
    config = tiny_classify.config(
        model,
        batch_size=16,
        accumulate=2,
        data={"views": 2},
        mixup=RECIPE | {"group": 4},
        erasing={"probability": 0.25},
        mesh={"data": 1, "fsdp": 4},
    )
    with jax.default_matmul_precision("default"):
        plan = make_plan(config, described.topology("v5e:2x2", 1), name="tiny", samples=1000)
    assert plan.fits
    (found,) = plan.estimates.values()
    assert found.bound_seconds > 0
    # Groups lie on one device, so no pixels are sent to be mixed: 16 x 2 rows of float32 would be.
    pixels = 32 * tiny_classify.FRAMES * tiny_classify.SIZE**2 * 3 * 4
    assert max(link.sent for link in found.links) < pixels
