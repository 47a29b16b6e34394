"""CLIP training: what moves, what does not, what drops, what a frozen tower costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from iv2_jax.errors import ConfigError
from iv2_jax.models import kinds
from iv2_jax.objectives.contrastive import contrastive_loss
from iv2_jax.parallel.mesh import make_mesh
from iv2_jax.train import loop
from iv2_jax.train.clip import ClipStage
from iv2_jax.train.program import build_program
from tests.train import tiny_clip


def _flat(tree):
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def _arrays(config, step, media="video"):
    batch = tiny_clip.batch(config.model, step, media=media)
    return {k: v for k, v in batch.items() if k not in ClipStage.host_arrays}


def _losses(config, seeds, train=True):
    """Losses of one batch drawn with several seeds."""
    stage = config.make_stage()
    params = _unboxed(stage.init_params(jax.random.key(3)))
    batch = _arrays(config, 0)

    def one(seed):
        return stage.loss_fn(params, {}, batch, jax.random.key(seed), train=train)[0]

    one = jax.jit(one)
    return {float(one(seed)) for seed in seeds}


def _unboxed(params):
    from flax.core import meta

    return meta.unbox(params)


@pytest.mark.parametrize("small", [False, True])
def test_only_pool_and_temperature_move(small):
    config = tiny_clip.config(tiny_clip.model(small))
    program = build_program(config, config.make_stage(), make_mesh(config.mesh))
    state = program.init(jax.random.key(0))
    before = _flat(state.params)
    steps = program.compile_steps()
    assert set(steps) == {"image", "video"}
    for step, media in enumerate(("image", "video", "image")):
        state, metrics = steps[media](state, {}, _arrays(config, step, media), jax.random.key(0))
        assert np.isfinite(float(metrics["loss"]))
    for path, value in _flat(state.params).items():
        moves = path.startswith(("vision_encoder/pool/", "vision_align/")) or path == "temp"
        if moves:
            assert path == "temp" or np.any(value != before[path]), path
        else:
            np.testing.assert_array_equal(
                value.view(np.uint8), before[path].view(np.uint8), err_msg=path
            )
    trained = sum(
        v.size for p, v in before.items() if p.startswith(("vision_encoder/pool/", "vision_align/"))
    )
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim or x.dtype == jnp.float32]
    assert sum(x.size for x in moments) == 2 * (trained + 1)  # mu and nu, temp's with them


def test_temperature_stays_at_its_floor():
    config = tiny_clip.config(tiny_clip.model(True))
    stage = config.make_stage()
    params = {"temp": jnp.float32(0.003), "other": jnp.float32(0.003)}
    out = stage.project(params)
    assert float(out["temp"]) == np.float32(config.model.temp_min)
    assert float(out["other"]) == np.float32(0.003)
    assert float(stage.project({"temp": jnp.float32(0.7)})["temp"]) == np.float32(0.7)


def test_frozen_towers_do_not_drop_unless_asked_to():
    clip = tiny_clip.model(True, drop_path=0.6)
    quiet = tiny_clip.config(clip)
    loud = tiny_clip.config(clip, frozen_towers_in_train_mode=True)
    (held_out,) = _losses(quiet, range(2), train=False)
    assert _losses(quiet, range(3)) == {held_out}
    assert len(_losses(loud, range(3))) == 3
    # Trained blocks drop without being asked.
    free = {"lr": 1e-3, "scale_lr_by_batch": False, "decay": [["temp", 0.0]]}
    full = tiny_clip.config(clip, optimizer=free)
    assert len(_losses(full, range(3))) == 3


def test_adapters_drop_only_where_they_are_trained():
    clip = tiny_clip.model(lora=True)
    optimizer = tiny_clip.values(clip)["optimizer"]
    stage = tiny_clip.config(clip).make_stage()
    assert stage._drops == {"vision": False, "text": False}
    opened = {**optimizer, "open": [*tiny_clip.OPEN, "text_encoder/.*/lora_[ab]"]}
    config = tiny_clip.config(clip, optimizer=opened)
    stage = config.make_stage()
    assert stage._drops == {"vision": False, "text": True}
    program = build_program(config, stage, make_mesh(config.mesh))
    state = program.init(jax.random.key(0))
    before = _flat(state.params)
    for step in range(2):
        state, _ = program.train_step(state, {}, _arrays(config, step), jax.random.key(0))
    moved = {p for p, v in _flat(state.params).items() if np.any(v != before[p])} - {"temp"}
    assert moved == {p for p in before if "lora_" in p or p.startswith("vision_encoder/pool/")}


def test_frozen_towers_cost_no_backward():
    clip = tiny_clip.model()
    config = tiny_clip.config(clip)
    free = {"lr": 1e-3, "scale_lr_by_batch": False, "decay": [["temp", 0.0]]}
    full = tiny_clip.config(clip, optimizer=free)
    scans = {}
    for name, one in (("pool", config), ("full", full)):
        program = build_program(one, one.make_stage(), make_mesh(one.mesh))
        traced = jax.make_jaxpr(program.train_step)(
            program.abstract_state, {}, program.abstract_batches["video"], jax.random.key(0)
        )
        scans[name] = _count(traced.jaxpr, "scan")
    # Vision and text blocks: once forward; in the full fine-tune once more backward.
    assert scans == {"pool": 2, "full": 4}


def _count(jaxpr, name):
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += 0 if equation.primitive.name == "scan" else _count(inner, name)
    return total


def test_rows_without_words_count_nowhere():
    config = tiny_clip.config(tiny_clip.model())
    stage = config.make_stage()
    params = _unboxed(stage.init_params(jax.random.key(0)))
    batch = _arrays(config, 1)
    batch["text_video"][2] = 0
    batch["text_video"][5, 2:] = 0  # start and end alone

    part = {name: params[name] for name in ("temp", "text_encoder")}

    def loss(part, batch):
        return stage.loss_fn({**params, **part}, {}, batch, jax.random.key(0), train=True)[0]

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    value, grads = value_and_grad(part, batch)
    kept = np.array([0, 1, 3, 4, 6, 7])
    alone, alone_grads = value_and_grad(part, {name: x[kept] for name, x in batch.items()})
    np.testing.assert_allclose(value, alone, rtol=1e-5)
    for path, grad in _flat(grads).items():
        np.testing.assert_allclose(
            grad, _flat(alone_grads)[path], rtol=1e-3, atol=2e-5, err_msg=path
        )
    nothing = {**batch, "text_video": np.zeros_like(batch["text_video"])}
    value, grads = value_and_grad(part, nothing)
    assert float(value) == 0
    assert all(np.all(grad == 0) for grad in jax.tree.leaves(grads))


def test_loss_is_the_contrast_of_the_towers():
    config = tiny_clip.config(tiny_clip.model(True), loss={"feature_gradient": 0.25})
    stage = config.make_stage()
    params = _unboxed(stage.init_params(jax.random.key(0)))
    batch = _arrays(config, 1)

    # What both towers feed into, so that no backward pass through them is compiled.
    part = {name: params[name] for name in ("temp", "vision_align")}

    def theirs(part):
        video = config.model.vision.normalize(batch["video"])
        out = (
            kinds.of(config.model)
            .build(config.model)
            .apply({"params": {**params, **part}}, video, batch["text_video"])
        )
        return contrastive_loss(out.vision, out.text, out.temperature, batch["match_id"])

    def ours(part):
        return stage.loss_fn({**params, **part}, {}, batch, jax.random.key(0), train=True)[0]

    (value, grads), (other, wanted) = (jax.jit(jax.value_and_grad(f))(part) for f in (ours, theirs))
    np.testing.assert_allclose(value, other, rtol=1e-6)
    np.testing.assert_allclose(grads["temp"], wanted["temp"], rtol=1e-4)
    name = "vision_align/proj/kernel"  # encoders get a quarter of it, the temperature all
    np.testing.assert_allclose(_flat(grads)[name], 0.25 * _flat(wanted)[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_small": None}, "give one of clip"),
        ({"loss": {"caption": "avs"}}, "loss.caption 'avs' is not in data.media.image.text"),
        ({"retrieval": {"rerank_top": 4}}, "no matching head"),
        ({"loss": {"frame_tokens": -1}}, "frame_tokens"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_clip.config(tiny_clip.model(True), **changes)


def test_data_of_another_size_are_refused():
    values = tiny_clip.values(tiny_clip.model(True))
    values["data"]["media"]["video"]["num_frames"] = 2
    with pytest.raises(ConfigError, match=r"video\.num_frames must be 4, not 2"):
        tiny_clip.config(tiny_clip.model(True), data=values["data"])


def test_a_run_ends_with_a_checkpoint_that_says_what_it_holds(tmp_path, monkeypatch):
    from iv2_jax.interop import run_config
    from iv2_jax.train import checkpoint

    clip = tiny_clip.model(True)
    config = tiny_clip.config(clip)

    def batches(self, start_step):
        for step in range(start_step, 100):
            yield tiny_clip.batch(clip, step, media=("image", "video")[step % 2])

    monkeypatch.setattr(ClipStage, "train_batches", batches)
    assert loop.train(config, tmp_path / "run").reason == "complete"
    params, values = checkpoint.load_params(tmp_path / "run")
    assert run_config.read_run(values) == clip
    assert float(params["temp"]) >= clip.temp_min
