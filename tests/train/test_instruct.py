"""Stage 3 through the loop: stopping, broken clips, freezing, micro-batches, meshes."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError
from iv2_jax.parallel.mesh import make_mesh
from iv2_jax.train import loop
from iv2_jax.train.checkpoint import load_params
from iv2_jax.train.instruct_config import InstructConfig
from iv2_jax.train.metrics import read_metrics
from iv2_jax.train.program import build_program
from tests.train import tiny_instruct as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instruct")
    tiny.write_tokenizer(folder / "tok")
    tiny.write_talks(folder / "data", bad=True)
    tiny.write_talks(folder / "data")
    tiny.write_talks(folder / "data", kinds="video,image,text")
    return folder


def _config(folder, mix="talks_video.json", **changes):
    # Adapters where the base is frozen.
    chat = tiny.model(lora=0.0 if "freeze" in changes.get("optimizer", {}) else None)
    values = tiny.values(folder / "tok", folder / "data" / mix, chat, **changes)
    return config_lib.build(InstructConfig, values)


def test_a_run_resumes_exactly_and_counts_broken_clips(folder, tmp_path):
    """Frozen parts stay as they were; the loss of a broken clip's conversation is left out."""
    changes = {
        "optimizer": {"lr": 0.05, "scale_lr_by_batch": False, "freeze": tiny.FREEZE}
        | {"open": tiny.OPEN},
        "eval_mix": str(folder / "data" / "talks_video.json"),
    }
    config = _config(folder, "talks_video_bad.json", **changes)
    assert loop.train(config, tmp_path / "whole").reason == "complete"
    stopped = dataclasses.replace(config, stop_after=2)
    assert loop.train(stopped, tmp_path / "parts").exit_code == 75
    assert loop.train(config, tmp_path / "parts").reason == "complete"
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    keep = ("step", "kind", "loss", "accuracy", "targets", "padding", "unread")
    assert [{k: m[k] for k in keep} for m in whole] == [{k: m[k] for k in keep} for m in parts]
    steps = [m for m in whole if m["kind"] == "train"]
    assert steps[-1]["replaced"] == sum(m["unread"] for m in steps) == 2  # once an epoch of two
    first, last = (m for m in whole if m["kind"] == "eval")
    assert last["loss"] < first["loss"]
    started, _ = load_params(tmp_path / "parts/checkpoints/2")
    ended, _ = load_params(tmp_path / "whole")
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), started, ended)
    assert not any(jax.tree.leaves(moved["encoder"]))
    assert not moved["llm"]["head"]["kernel"]
    assert moved["llm"]["head"]["lora_b"]
    assert moved["bridge"]["query_tokens"]


@pytest.fixture(scope="module")
def batch(folder):
    """A packed batch of eight rows."""
    config = _config(folder, batch_size=8)
    return next(config.make_stage().train_batches(0))


def _step(config, batch):
    """Metrics and gradients of one step, with parameters that do not depend on the mesh."""
    stage = config.make_stage()
    program = build_program(config, stage, make_mesh(config.mesh))
    shapes = program.abstract_state
    params = tiny.draw(shapes.params)
    params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), params, shapes.params)
    state = program.init(jax.random.key(0)).replace(params=params)
    arrays = loop.to_device(batch, stage.host_arrays, program.mesh)
    state, metrics = program.train_step(state, {}, arrays, jax.random.key(1))
    return jax.device_get(metrics), jax.device_get(optax_mu(state.opt_state))


def optax_mu(state):
    """First moments of the optimizer after a step: a tenth of the gradients."""
    return next(part.mu for part in state if hasattr(part, "mu"))


@pytest.fixture(scope="module")
def whole(folder, batch):
    return _step(_config(folder, batch_size=8, **_PLAIN), batch)


_PLAIN = {"optimizer": {"clip_norm": 0.0, "weight_decay": 0.0}, "loss": {"logits_share": 0.05}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2, "mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
        {"accumulate": 4, "loss": {"logits_share": 1.0}},
    ],
    ids=["mesh", "more_parts"],
)
def test_split_steps_are_the_whole_step(folder, batch, whole, changes):
    metrics, grads = _step(_config(folder, batch_size=8, **_PLAIN | changes), batch)
    for name in ("loss", "accuracy", "targets", "padding", "unread"):
        np.testing.assert_allclose(metrics[name], whole[0][name], rtol=1e-5, err_msg=name)
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(whole[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, whole[1])


def test_every_kind_of_batch_has_the_planned_arrays(folder):
    """Videos, pictures and text alone; with kept tokens the same but for the pixels."""
    mix = "talks_video,image,text.json"
    for changes in ({}, {"keep_features_gb": 1.0}):
        config = _config(folder, mix, **_FROZEN, **changes, talk={"augment": "center"})
        stage = config.make_stage()
        planned = stage.abstract_batches(config.batch_size)
        assert set(planned) == {"video-128x2", "image-128x2", "text-128"}
        if changes:
            stage.start(tiny.draw(_shapes(stage)), make_mesh(config.mesh))
        seen = set()
        batches = stage.train_batches(0)
        for batch in (next(batches) for _ in range(stage.tokens.plan.epoch_steps)):
            arrays = {k: v for k, v in batch.items() if k not in stage.host_arrays}
            want = planned[batch["media"]]
            assert {k: (v.shape, v.dtype) for k, v in arrays.items()} == {
                k: (v.shape, v.dtype) for k, v in want.items()
            }
            seen.add(batch["media"])
        assert seen == set(planned)
        assert ("features" in planned["video-128x2"]) == bool(changes)


_FROZEN = {"optimizer": {"freeze": tiny.FREEZE, "open": tiny.OPEN}}


def _shapes(stage):
    from flax.core import meta

    return meta.unbox(jax.eval_shape(stage.init_params, jax.random.key(0)))


def test_kept_tokens_are_what_the_encoder_gives(folder):
    """Clips that do not decode leave the loss with either."""
    seen = []
    fixed = {"augment": "center", "sampling": "fps25"}  # the same frames in training, too
    for keep in (0.0, 1.0):
        config = _config(
            folder, "talks_video_bad.json", **_FROZEN, keep_features_gb=keep, talk=fixed
        )
        stage = config.make_stage()
        params = tiny.draw(_shapes(stage))
        stage.start(params, make_mesh(config.mesh))
        batches = stage.train_batches(0)
        seen.append([next(batches), next(batches)])
        assert sum(int(batch["unread"].sum()) for batch in seen[-1]) == 1
    for fresh, kept in zip(*seen, strict=True):
        pixels = config.chat.encoder.normalize(fresh["video"])
        given = stage.model.apply({"params": params}, pixels, method="encode")
        shown = fresh["clips"] >= 0
        shown &= kept["features"].any((2, 3))  # the broken clip has none
        np.testing.assert_allclose(kept["features"][shown], given[shown], atol=1e-5)
        np.testing.assert_array_equal(kept["targets"], fresh["targets"])
    with pytest.raises(ConfigError, match=r"tokens of 4 clips take 0.00 GB"):
        dataclasses.replace(config, keep_features_gb=1e-6).make_stage().start(params, None)


def test_misfits_are_named(folder):
    with pytest.raises(ConfigError, match=r"tokens_per_view=4, but the model has 5"):
        _config(folder, talk={"sequence": {"tokens_per_view": 4}})
    with pytest.raises(ConfigError, match=r"keep_features_gb needs a frozen encoder"):
        _config(folder, keep_features_gb=1.0, talk={"augment": "center"}).make_stage()
    with pytest.raises(ConfigError, match="mix is empty"):
        next(dataclasses.replace(_config(folder), mix="").make_stage().train_batches(0))
