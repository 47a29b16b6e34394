"""Stage 2 end to end on small real files: media mixing, terms, validity, resume, freezing."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError
from iv2_jax.models import zoo
from iv2_jax.parallel.mesh import make_mesh
from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train import loop
from iv2_jax.train.align_config import AlignConfig
from iv2_jax.train.batches import abstract_batches
from iv2_jax.train.metrics import read_metrics
from iv2_jax.train.program import build_program
from tests.train import tiny_align


def _lines(workdir, kind="train"):
    keep = ("loss", "grad_norm", "temperature")
    return [
        {name: value for name, value in line.items() if name.startswith(keep)}
        for line in read_metrics(workdir, kind)
    ]


def _batch(config, kind, seed=0):
    """Random arrays of a kind of batch."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, x in abstract_batches(config.data, config.batch_size)[kind].items():
        if x.dtype == jnp.uint8:
            arrays[name] = rng.integers(0, 256, x.shape, np.uint8)
        elif name.startswith("text_"):
            arrays[name] = rng.integers(5, tiny_align.VOCAB, x.shape, np.int32)
        elif name == "match_id":
            arrays[name] = np.arange(*x.shape, dtype=np.int32)
        else:
            arrays[name] = (
                np.ones(x.shape, bool)
                if x.dtype == jnp.bool_
                else rng.normal(size=x.shape).astype(np.float32)
            )
    return {name: jnp.asarray(x) for name, x in arrays.items()}


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return tiny_align.config(tmp_path_factory.mktemp("lists")).make_stage()


@pytest.fixture(scope="module")
def params(stage):
    return meta.unbox(jax.jit(stage.init_params)(jax.random.key(0)))


@functools.cache
def _compiled(stage):
    return jax.jit(stage.loss_fn, static_argnames="train")


def _loss(stage, params, batch, *, train=False, seed=0):
    loss, terms = _compiled(stage)(params, {}, batch, jax.random.key(seed), train=train)
    return float(loss), {name: float(value) for name, value in terms.items()}


def test_retrieval_may_look_for_other_media_than_the_loss(tmp_path):
    found = {}
    for media in ("", "video"):
        config = tiny_align.config(tmp_path, ("audio_video",), retrieval={"media": media})
        stage = config.make_stage()
        params = meta.unbox(jax.jit(stage.init_params)(jax.random.key(0)))
        found[media] = stage.evaluate(params, {}, make_mesh(config.mesh))["clips"]
    assert found == {"": 3, "video": 6}  # half of the videos have sound


@pytest.mark.slow
@pytest.mark.pod
def test_all_media_train_and_evaluate(tmp_path):
    values = tiny_align.values(tmp_path)
    names = ("vtc", "atc", "avtc", "avtm", "mlm")
    values["loss"]["weights"] = dict.fromkeys(names, 1.0)
    config = config_lib.build(AlignConfig, values)
    ending = loop.train(config, tmp_path / "run")
    assert ending.reason == "complete", ending.text
    lines = list(read_metrics(tmp_path / "run", "train"))
    assert len(lines) == config.steps
    for line in read_metrics(tmp_path / "run", "eval"):
        assert {f"loss_{name}" for name in names} <= set(line)
        assert {"sim/t2v_r1", "match/t2v_r1", "chance/t2v_r1"} <= set(line)


def test_stopped_and_resumed_in_mid_epoch_gives_the_same_losses(tmp_path):
    loss = {"weights": {"vtc": 1.0, "atc": 1.0}}
    media = ("audio", "video")
    whole = tiny_align.config(tmp_path, media, steps=7, loss=loss, eval_data=None)
    loop.train(whole, tmp_path / "whole")
    shown = [line["media"] for line in itertools.islice(whole.make_stage().train_batches(0), 7)]
    assert len(set(shown)) == 2
    part = dataclasses.replace(whole, stop_after=3)
    while loop.train(part, tmp_path / "part").reason == "stopped":
        pass
    assert _lines(tmp_path / "part") == _lines(tmp_path / "whole")


def test_padded_mix_trains_in_one_shape(tmp_path):
    values = tiny_align.values(tmp_path, ("audio", "audio_video", "image"))
    values["data"]["mode"] = "padded"
    values["loss"]["weights"] = {"vtc": 1.0, "atm": 1.0}
    values |= {"batch_size": 6, "steps": 2, "retrieval": {"enabled": False}}
    config = config_lib.build(AlignConfig, values)
    assert set(abstract_batches(config.data, 6)) == {"mixed"}
    assert loop.train(config, tmp_path / "run").reason == "complete"


@pytest.mark.parametrize("kind", ["audio", "audio_video", "image", "text", "video"])
def test_terms_of_each_media_type(stage, params, kind):
    _, terms = _loss(stage, params, _batch(stage.config, kind))
    want = {
        "audio": {"atc", "atm", "amlm"},
        "audio_video": set(tiny_align.ALL_TERMS),
        "text": {"mlm"},
    }.get(kind, {"vtc", "vtm", "mlm"})
    assert {name.removeprefix("loss_") for name in terms if name.startswith("loss_")} == want
    assert all(np.isfinite(value) and value > 0 for value in terms.values())


def test_rows_without_sound_count_in_no_audio_term(stage, params):
    batch = _batch(stage.config, "audio_video")
    silent = batch | {"has_audio": jnp.asarray([True, True, True, False])}
    other = silent | {"fbank": silent["fbank"].at[3].set(jnp.nan)}
    _, terms = _loss(stage, params, silent)
    _, same = _loss(stage, params, other)
    assert same == terms
    _, whole = _loss(stage, params, batch)
    changed = {name for name in terms if terms[name] != whole[name]}
    assert changed == {f"loss_{n}" for n in ("atc", "avc", "avtc", "atm", "avtm", "amlm", "avmlm")}


def test_rows_without_words_count_in_no_text_term(stage, params):
    batch = _batch(stage.config, "video")
    none = batch | {"text_video": batch["text_video"].at[2].set(0)}
    only_class_token = batch | {"text_video": batch["text_video"].at[2].set(0).at[2, 0].set(2)}
    _, terms = _loss(stage, params, none)
    _, same = _loss(stage, params, only_class_token)
    for name in ("loss_vtc", "loss_vtm", "loss_mlm"):
        assert same[name] == pytest.approx(terms[name], rel=1e-6)
    everything = batch | {"text_video": jnp.zeros_like(batch["text_video"])}
    assert _loss(stage, params, everything)[0] == 0


def test_rows_that_fill_up_an_evaluation_batch_do_not_count(stage, params):
    batch = _batch(stage.config, "video")
    valid = jnp.asarray([True, True, True, False])
    one = batch | {"valid": valid}
    other = one | {"video": one["video"].at[3].set(0), "text_video": one["text_video"].at[3].set(7)}
    assert _loss(stage, params, one) == _loss(stage, params, other)


def test_a_mask_hides_patches_in_training_only(stage, params):
    batch = _batch(stage.config, "video")
    grid = stage.config.stage2.vision.encoder.grid
    visible = stage._visible(batch, None, jax.random.key(0))
    assert visible.shape == (4, 1 + int(np.prod(grid)) // 2)
    assert stage.tokens_per_clip("video") > visible.shape[1]
    tube = dataclasses.replace(
        stage.config, video_mask=dataclasses.replace(stage.config.video_mask, kind="tube")
    ).make_stage()
    patches = np.asarray(tube._visible(batch, None, jax.random.key(0)))[:, 1:] - 1
    frames = patches.reshape(4, grid[0], -1) - np.arange(grid[0])[:, None] * grid[1] * grid[2]
    assert (frames == frames[:, :1]).all()


def test_frozen_towers_do_not_move_and_are_in_eval_mode(tmp_path):
    optimizer = {
        "lr": 1e-3,
        "scale_lr_by_batch": False,
        "freeze": ["vision_encoder/.*", "audio_encoder/.*"],
        "open": ["vision_encoder/encoder/pool/.*"],
    }
    few = {"steps": 2, "loss": {"weights": {"vtc": 1.0}}, "retrieval": {"enabled": False}}
    config = tiny_align.config(tmp_path, ("video",), optimizer=optimizer, **few)
    stage = config.make_stage()
    assert stage._trained == (False, True, False, True)
    loop.train(config, tmp_path / "run")
    trained, _ = checkpoint_lib.load_params(tmp_path / "run")
    fresh = (
        build_program(config, stage, make_mesh(config.mesh))
        .init(jax.random.key(config.seed))
        .params
    )
    for path, moved in (("blocks/attn/qkv/kernel", False), ("pool/q/kernel", True)):
        a, b = trained["vision_encoder"]["encoder"], fresh["vision_encoder"]["encoder"]
        for key in path.split("/"):
            a, b = a[key], b[key]
        assert np.array_equal(a, b) is not moved, path


def test_drop_path_of_frozen_towers_by_flag(tmp_path):
    optimizer = {"freeze": ["vision_encoder/.*", "text_encoder/.*"]}
    model = config_lib.to_dict(tiny_align.model(drop_path=0.8))
    still = tiny_align.config(tmp_path, ("video",), optimizer=optimizer, stage2=model)
    still = dataclasses.replace(
        still,
        loss=dataclasses.replace(still.loss, weights={"vtc": 1.0}),
        video_mask=dataclasses.replace(still.video_mask, kind="none"),
    )
    moving = dataclasses.replace(still, frozen_towers_in_train_mode=True)
    batch = _batch(still, "video")
    params = meta.unbox(jax.jit(still.make_stage().init_params)(jax.random.key(0)))
    for config, same in ((still, True), (moving, False)):
        stage = config.make_stage()
        a, b = (_loss(stage, params, batch, train=True, seed=s)[0] for s in (1, 2))
        assert (a == b) is same


def test_temperature_is_brought_back_into_its_range(stage, params):
    for given, kept in ((0.9, 0.5), (-1.0, 0.001), (0.07, 0.07)):
        projected = stage.project({**params, "temp": jnp.float32(given)})
        assert float(projected["temp"]) == pytest.approx(kept)


def test_released_gradient_of_the_contrast(tmp_path):
    config = tiny_align.config(tmp_path, ("video",))
    weights = {"vtc": 1.0}
    grads = {}
    for factor in (1.0, 1 / 64):
        loss = dataclasses.replace(config.loss, weights=weights, feature_gradient=factor)
        stage = dataclasses.replace(config, loss=loss).make_stage()
        params = meta.unbox(jax.jit(stage.init_params)(jax.random.key(0)))
        batch = _batch(config, "video")
        grads[factor] = jax.jit(
            jax.grad(
                lambda p, s=stage, b=batch: s.loss_fn(p, {}, b, jax.random.key(0), train=False)[0]
            )
        )(params)
    true, released = grads[1.0], grads[1 / 64]
    np.testing.assert_allclose(
        released["vision_proj"]["kernel"] * 64, true["vision_proj"]["kernel"], rtol=1e-4, atol=1e-7
    )
    assert float(released["temp"]) == pytest.approx(float(true["temp"]), rel=1e-5)


def test_decay_groups_are_the_original_s():
    """Spec stage2 2: none for position tables, class token, temperature, biases, 1-D parameters."""
    from iv2_jax.interop import families
    from iv2_jax.models import kinds
    from iv2_jax.parallel.rules import path_name
    from iv2_jax.train import optim

    config = zoo.get("internvideo2_stage2_6b")
    groups = optim.decay_multipliers(
        optim.OptimizerConfig(), kinds.of(config).abstract_params(config)
    )
    ours = {path_name(p): v for p, v in jax.tree_util.tree_leaves_with_path(groups)}
    tables = ("pos_embed", "img_pos_embed", "clip_pos_embed", "clip_img_pos_embed")
    bare = (*tables, "cls_token", "temp")
    entries = [entry for entry in families.of(config).entries(config) if entry.path]
    assert len(entries) > 100
    for entry in entries:
        key = entry.torch_keys[0]
        none = len(entry.torch_shape) < 2 or key.endswith(".bias") or key.split(".")[-1] in bare
        assert ours[entry.path] == (0.0 if none else 1.0), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"weights": {"vtx": 1.0}}}, r"loss.weights: no term 'vtx'; did you mean"),
        ({"loss": {"weights": {"vtc": -1.0}}}, "must be >= 0"),
        ({"loss": {"weights": {"atc": 1.0}}}, "data.media.image: no term"),
        ({"loss": {"default_caption": "asr"}}, "uses caption 'asr'"),
        ({"loss": {"contrastive": "sigmoid"}}, "contrast_bias_init"),
        ({"teacher": None, "video_mask": {"kind": "attention"}}, "config.teacher"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    values = tiny_align.values(tmp_path, ("image", "video")) | changes
    with pytest.raises(ConfigError, match=message):
        config_lib.build(AlignConfig, values)


def test_a_term_without_its_head_is_refused(tmp_path):
    values = tiny_align.values(tmp_path, ("audio_video",))
    values["stage2"] = config_lib.to_dict(tiny_align.model(audio_matching=False))
    with pytest.raises(ConfigError, match=r"'atm' needs stage2\.audio_matching"):
        config_lib.build(AlignConfig, values)
