"""Stage 1: what reaches the loss, what it refuses, and the same numbers on every mesh."""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.data.masking import random_mask
from iv2_jax.errors import ConfigError
from iv2_jax.models.masking import mask_to_visible
from iv2_jax.parallel.mesh import make_mesh
from iv2_jax.train import loop
from iv2_jax.train.program import build_program, put_frozen
from tests.train import tiny


@pytest.fixture(autouse=True)
def tiny_teacher(monkeypatch):
    tiny.register(monkeypatch)


def clips(batch_size=8, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch_size, 2 * tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3)
    return rng.integers(0, 256, shape, dtype=np.uint8)


def run_steps(config, steps=3):
    """Losses and last parameters of a few steps on the same clips."""
    stage = config.make_stage()
    program = build_program(config, stage, make_mesh(config.mesh))
    state = program.init(jax.random.key(0))
    frozen = put_frozen(stage, program.mesh)
    batch = loop.to_device({"video": clips(config.batch_size)}, (), program.mesh)
    key = jax.random.key(1)
    losses = []
    for _ in range(steps):
        state, metrics = program.train_step(state, frozen, batch, key)
        losses.append(jax.device_get(metrics))
    return losses, jax.device_get(state.params)


@functools.cache
def one_device():
    return run_steps(tiny.config())


@pytest.mark.slow
@pytest.mark.pod
def test_one_and_eight_devices_give_the_same_losses():
    """Over steps; every shape of mesh is in tests/parallel/test_every_mesh.py."""
    one, params_one = copy.deepcopy(one_device())
    many, params_many = run_steps(tiny.config(mesh={"data": 2, "fsdp": 2, "tensor": 2}))
    for a, b in zip(one, many, strict=True):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-5, err_msg=name)
    # Key biases of the pool have no gradient but rounding noise, which Adam blows up.
    params_one["encoder"]["pool"]["k"].pop("bias")
    params_many["encoder"]["pool"]["k"].pop("bias")
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)  # noqa: E731
    jax.tree.map(close, params_one, params_many)


def test_every_parameter_and_every_frame_reaches_the_loss():
    config = tiny.config()
    stage = config.make_stage()
    program = build_program(config, stage, make_mesh(config.mesh))
    params = program.init(jax.random.key(0)).params
    frozen = stage.load_frozen()

    def loss(params, video):
        video = video.astype(jnp.float32)
        return stage.loss_fn(params, frozen, {"video": video}, jax.random.key(1), train=False)[0]

    grads, by_pixel = jax.jit(jax.grad(loss, (0, 1)))(params, clips(2).astype(np.float32))
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        # What shifts all keys of the pool shifts all its scores alike: no gradient.
        if name not in (
            "['encoder']['pool']['k']['bias']",
            "['encoder']['pool']['norm_k']['bias']",
        ):
            assert float(jnp.abs(g).max()) > 1e-8, name
    by_frame = jnp.abs(by_pixel).max((0, 2, 3, 4))
    # The student sees every second frame; gradients do not flow through the teachers.
    assert (np.asarray(by_frame[::2]) > 0).all()
    assert (np.asarray(by_frame[1::2]) == 0).all()


def test_the_video_teacher_sees_every_frame():
    config = tiny.config()
    stage = config.make_stage()
    video = clips(2)
    changed = video.copy()
    changed[:, 1::2] = 255 - changed[:, 1::2]
    frozen = stage.load_frozen()
    before, after = stage.teach(frozen, video), stage.teach(frozen, changed)
    np.testing.assert_array_equal(before["clip"].tokens, after["clip"].tokens)
    assert np.abs(before["mae"].tokens - after["mae"].tokens).max() > 0.1


def test_loss_is_the_weighted_sum_of_its_terms():
    changes = {"loss": {"clip": 0.5, "final": 2.0, "mae": 0.0}}
    (first, *_), _ = run_steps(tiny.config(**changes), steps=1)
    want = 0.5 * first["loss_clip"] + 2 * first["loss_final"]
    np.testing.assert_allclose(first["loss"], want, rtol=1e-6)
    assert first["loss_mae"] > 0


def test_masks_differ_by_step_and_keep_their_size():
    stage = tiny.config().make_stage()
    outputs = stage.teach(stage.load_frozen(), clips(2))
    saliency = stage.saliency(outputs, 2)
    a, b = (stage.draw_visible(saliency, jax.random.key(i)) for i in (0, 1))
    assert a.shape == b.shape == (2, stage.tokens_per_clip()) == (2, 1 + 4 * 8)
    assert (a != b).any()
    assert (a[:, 0] == 0).all()


def test_loader_masks_are_used():
    config = tiny.config(mask={"kind": "random", "ratio": 0.5})
    stage = config.make_stage()
    program = build_program(config, stage, make_mesh(config.mesh))
    params = program.init(jax.random.key(0)).params
    grid = config.student.encoder.grid
    draw = lambda seed: mask_to_visible(  # noqa: E731
        np.stack([np.append(False, random_mask(grid, 0.5, np.random.RandomState(seed)))] * 2)
    )

    def loss(visible):
        batch = {"video": clips(2), "visible": visible}
        return stage.loss_fn(params, stage.load_frozen(), batch, jax.random.key(0), train=False)[0]

    assert stage.abstract_batches(2)[""]["visible"].shape == draw(0).shape
    assert float(loss(draw(0))) != float(loss(draw(1)))


def test_another_teacher_grid_pools_the_student(monkeypatch):
    values = tiny.values()
    values["student"]["clip"] |= {"grid": [4, 2, 2], "has_cls": False}
    values["clip_teacher"] = {"name": "tiny", "options": {"cells": 2, "cls": False}}
    losses, _ = run_steps(tiny.config(**values), steps=30)
    assert losses[-1]["loss_clip"] < 0.8 * losses[0]["loss_clip"]


def mistakes():
    def change(path, value):
        values = tiny.values()
        node = values
        *parents, last = path.split(".")
        for name in parents:
            node = node[name]
        node[last] = value
        return values

    salient = {"name": "tiny", "options": {"salient": False}}
    return {
        "student.clip.width gives 10": change("student.clip.width", 10),
        "student.clip.layers gives 1": change("student.clip.layers", [0]),
        "student.mae.has_cls gives True": change("student.mae.has_cls", True),
        r"student.clip.grid gives \(4, 2, 2\)": change("student.clip.grid", [4, 2, 2]),
        "student.final_width is 5": change("student.final_width", 5),
        "role 'mae' has a heads config but no teacher": change("mae_teacher", None),
        "role 'clip' has a teacher config but no heads": change("student.clip", None),
        "unknown teacher 'tny'; did you mean 'tiny'": change("clip_teacher", {"name": "tny"}),
        "needs a saliency map": change("clip_teacher", salient),
        "data.num_frames 6 must be a multiple": change("data.num_frames", 6),
        "data.size 64 is not student.encoder.image_size 32": change("data.size", 64),
        r"mask.ratio must be in \[0, 1\)": change("mask.ratio", 1.0),
    }


@pytest.mark.parametrize("message", mistakes())
def test_mistakes_are_refused_before_the_first_step(message):
    values = copy.deepcopy(mistakes()[message])
    with pytest.raises(ConfigError, match=message):
        tiny.config(**values).make_stage()
