"""Every stage, on every shape of mesh: the loss and the gradients of one device.

    IV2_EVERY_MESH=1 pytest tests/parallel/test_every_mesh.py    # all shapes of eight devices

Without it each stage is tried on one shape, which splits over all three axes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from iv2_jax import config as config_lib
from iv2_jax.models.audio.beats import BeatsConfig
from iv2_jax.models.audio.beats_layers import PositionConv
from iv2_jax.parallel import rules
from iv2_jax.parallel.mesh import MeshConfig, make_mesh
from iv2_jax.train import loop
from iv2_jax.train.instruct_config import InstructConfig
from iv2_jax.train.program import put_frozen
from iv2_jax.train.stage import STAGES
from tests.train import (
    tiny,
    tiny_align,
    tiny_bridge,
    tiny_classify,
    tiny_clip,
    tiny_instruct,
)

MESHES = [(2, 2, 2)]
if os.environ.get("IV2_EVERY_MESH"):
    MESHES += [(8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 1, 2), (1, 4, 2), (1, 2, 4)]


def _distill(folder):
    return tiny.config(), {}


def _align(folder):
    loss = {"weights": {"vtc": 1.0, "avtm": 1.0, "mlm": 1.0}, "group_size": 4}
    values = tiny_align.values(folder, ("audio_video",), batch_size=8)
    return config_lib.build(tiny_align.AlignConfig, values | {"loss": values["loss"] | loss}), {}


def _clip(folder):
    clip = tiny_clip.model(drop_path=0.2)
    return tiny_clip.config(clip, optimizer={"clip_norm": 0.0}), tiny_clip.batch(clip, 0)


def _classify(folder):
    return tiny_classify.config(tiny_classify.model(drop_path=0.2)), {}


def _bridge(folder):
    loss = {"start_id": tiny_bridge.START, "group_size": 4, "logits_share": 0.3}
    return tiny_bridge.config(loss=loss), {"text_video": tiny_bridge.batch()["text_video"]}


def _instruct(folder):
    chat = tiny_instruct.model()
    tokenizer = tiny_instruct.write_tokenizer(folder / "tok")
    values = tiny_instruct.values(tokenizer, "", chat, batch_size=8)
    values["rows"] = {"mode": "pack", "lengths": [32], "views": [2], "max_segments": 4}
    values["talk"]["sequence"]["max_length"] = 32
    config = config_lib.build(InstructConfig, values)
    rng, k = np.random.default_rng(0), chat.bridge.num_tokens
    targets = rng.integers(5, tiny_instruct.VOCAB, (8, 32)).astype(np.int32)
    targets[:, : 2 * k + 2] = -1
    targets[3, 20:] = -1  # rows count by their targets
    visual = np.full((8, 32), -1, np.int32)
    visual[:, 1 : 2 * k + 1] = np.arange(2 * k)
    segments = np.where(np.arange(32) < 24, 1, 2) * np.ones((8, 1), np.int32)
    return config, {
        "targets": targets,
        "visual_index": visual,
        "segment_ids": segments.astype(np.int32),
        "positions": np.where(segments == 1, np.arange(32), np.arange(32) - 24).astype(np.int32),
        "unread": np.zeros(8, np.int32),
    }


CASES = {
    "distill": _distill,
    "align": _align,
    "clip": _clip,
    "classify": _classify,
    "bridge": _bridge,
    "instruct": _instruct,
}


def _batch(stage: Any, rows: int, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Random arrays of the stage's batch of videos, but what is given."""
    kinds = stage.abstract_batches(rows)
    rng, arrays = np.random.default_rng(0), {}
    for name, x in kinds[next((k for k in kinds if "video" in k), "")].items():
        if name in given:
            arrays[name] = given[name]
        elif name == "match_id":
            arrays[name] = np.arange(*x.shape, dtype=x.dtype)
        elif x.dtype == np.bool_:
            arrays[name] = np.ones(x.shape, bool)
        elif x.dtype == np.float32:
            arrays[name] = rng.normal(size=x.shape).astype(np.float32)
        else:
            high = {"video": 256, "label": 3}.get(name, 120)
            arrays[name] = rng.integers(0 if high != 120 else 5, high, x.shape).astype(x.dtype)
    return arrays


def _gradients(config: Any, given: dict[str, np.ndarray], mesh: MeshConfig) -> tuple[Any, Any]:
    """Loss, its terms and gradients in training, of parameters that do not depend on the mesh."""
    stage, devices = dataclasses.replace(config, mesh=mesh).make_stage(), make_mesh(mesh)
    boxed = jax.eval_shape(stage.init_params, jax.random.key(0))
    params = tiny_instruct.draw(meta.unbox(boxed))
    if "temp" in params:
        params["temp"] = np.full_like(params["temp"], 0.2)
    shardings, rows = rules.shardings(boxed, devices, mesh)
    split = [row for row in rows if any(row.spec)]
    assert bool(split) == (mesh.fsdp * mesh.tensor > 1)
    arrays = loop.to_device(_batch(stage, config.batch_size, given), stage.host_arrays, devices)

    def loss(params: Any, frozen: Any, batch: Any) -> tuple[jax.Array, Any]:
        with jax.sharding.use_abstract_mesh(devices.abstract_mesh):
            return stage.loss_fn(params, frozen, stage.weigh(batch), jax.random.key(1), train=True)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found = step(jax.device_put(params, shardings), put_frozen(stage, devices, mesh), arrays)
    return jax.device_get(found)


@functools.cache
def _one_device(stage: str, folder: Any) -> tuple[Any, Any, Any, Any]:
    """A stage's config and batch, and what one device makes of them."""
    config, given = CASES[stage](folder)
    return config, given, *_gradients(config, given, MeshConfig(max_devices=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of the stages' files."""
    return tmp_path_factory.mktemp("stages")


def test_no_stage_is_left_out():
    assert CASES.keys() == {name for name in STAGES if name != "toy"}


def test_the_gradient_of_captions_is_whole_on_a_tensor_mesh():
    """The loss takes its places in a loop, the head norms what `tensor` would split."""
    config, given = _bridge(None)
    stage, ids = config.make_stage(), given["text_video"]
    boxed = jax.eval_shape(stage.init_params, jax.random.key(0))
    params = tiny_instruct.draw(meta.unbox(boxed))
    width = config.model.bridge.width
    hidden = np.random.default_rng(0).normal(size=(*ids.shape, width)).astype(np.float32)
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        devices = make_mesh(MeshConfig(*sizes, max_devices=int(np.prod(sizes))))
        shardings, _ = rules.shardings(boxed, devices)
        arrays = loop.to_device({"hidden": hidden, "ids": ids}, (), devices)

        def loss(params: Any, hidden: Any, ids: Any, devices: Any = devices) -> jax.Array:
            with jax.sharding.use_abstract_mesh(devices.abstract_mesh):
                return stage._captions(params, hidden, ids, np.ones(8, bool))["loss_cap"]

        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        grads = step(jax.device_put(params, shardings), arrays["hidden"], arrays["ids"])
        found.append(jax.device_get((grads[0]["lm_head"], grads[1])))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("sizes", [(4, 1, 2), (1, 2, 4), (2, 2, 2)])
def test_the_gradient_of_the_position_convolution_counts_tensor_once(sizes):
    """XLA multiplies the gradient of a grouped convolution's kernel by the size of that axis."""
    config = BeatsConfig(width=16, num_heads=2, conv_taps=4, conv_groups=2)
    model, x = PositionConv(config), np.random.default_rng(0).normal(size=(8, 6, 16)).astype("f4")
    boxed = jax.eval_shape(model.init, jax.random.key(0), x)
    params = tiny_instruct.draw(meta.unbox(boxed))
    found = []
    for shape in ((1, 1, 1), sizes):
        devices = make_mesh(MeshConfig(*shape, max_devices=int(np.prod(shape))))
        shardings, _ = rules.shardings(boxed, devices)
        step = jax.jit(jax.grad(lambda params, x: jnp.mean(model.apply(params, x) ** 2)))
        arrays = loop.to_device({"x": x}, (), devices)
        found.append(jax.device_get(step(jax.device_put(params, shardings), arrays["x"])))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("stage", CASES)
def test_loss_and_gradients_are_those_of_one_device(stage, sizes, folder, monkeypatch):
    tiny.register(monkeypatch)
    config, given, one, want = _one_device(stage, folder)
    many, got = _gradients(config, given, MeshConfig(*sizes))
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    for name, value in one[1].items():
        np.testing.assert_allclose(many[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    # Gradients that are almost nothing beside the largest are rounding of larger terms that cancel:
    # a key's bias, which no score depends on, or the contrast's, which is made in float32.
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
    assert np.isfinite(largest)
    assert largest > 0
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        limit = 1e-5 * float(np.abs(a).max()) + 1e-6 * largest
        np.testing.assert_allclose(b, a, rtol=0, atol=limit, err_msg=rules.path_name(path))
