"""A classifier on decoded clips: learning, exact resume, evaluation, and what it starts from."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from iv2_jax import cli
from iv2_jax.errors import CheckpointError, ConfigError, DataError
from iv2_jax.eval.runner import encoder_of
from iv2_jax.interop import load, recipes
from iv2_jax.models import kinds, zoo
from iv2_jax.models.student import StudentConfig
from iv2_jax.train import checkpoint, init_towers, loop
from iv2_jax.train.init_towers import TowerInit
from iv2_jax.train.metrics import read_metrics
from tests.train import tiny_classify

STEPS = 24


def _config(manifest, **changes):
    """The recipe on twelve films, four a step: an epoch is three steps."""
    data = {
        "source": str(manifest),
        "split": "train",
        "augment": "finetune_crop",
        "crop_area": [0.5, 1.0],
        "rand_augment": {"ops": 1, "magnitude": 2.0},
        "flip": False,
        "views": 2,
        "shared_frames": True,
        "threads": 0,
    }
    test = {"source": str(manifest), "split": "test", "augment": "center", "size": 28}
    test |= {"num_frames": 4, "sampling": "segments", "views": 2, "threads": 0}
    return tiny_classify.config(
        tiny_classify.model(drop_path=0.1),
        **{
            "steps": STEPS,
            "batch_size": 4,
            "data": data,
            "eval_data": test,
            "label": "motion",
            "mixup": {"mixup": 0.8, "cutmix": 1.0, "probability": 0.25, "group": 8},
            "erasing": {"probability": 0.25},
            "test_views": 2,
            "optimizer": {"lr": 1e-2, "scale_lr_by_batch": False, "clip_norm": 1.0, "b2": 0.95},
            **changes,
        },
    )


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """The manifest, and a finished run on it."""
    folder = tmp_path_factory.mktemp("films")
    manifest = tiny_classify.write_clips(folder)
    assert loop.train(_config(manifest), folder / "run").reason == "complete"
    return manifest, folder / "run"


def _losses(workdir):
    return [line["loss"] for line in read_metrics(workdir, "train")]


def test_it_learns_and_counts_every_clip_once(films, tmp_path):
    _, run = films
    losses = _losses(run)
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])
    first, last = (read_metrics(run, "eval")[i] for i in (0, -1))
    assert last["loss"] < 0.9 * first["loss"]
    # Five clips in two batches of four: each figure is a number of fifths.
    assert last["top1"] * 5 / 100 == pytest.approx(round(last["top1"] * 5 / 100), abs=1e-4)

    out = tmp_path / "table.json"
    command = ["eval", "--task", "classification", "--ckpt", str(run), "--by-class"]
    assert cli.main([*command, "--batch-size", "3", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["metrics"]["top1"] == pytest.approx(last["top1"], abs=1e-3)
    assert row["metrics"]["clips"] == 5
    assert row["metrics"]["chance/top1"] == pytest.approx(100 / 3)
    assert sorted(row["predictions"]) == [f"test{i}" for i in range(5)]
    right = [p["right"] for p in row["predictions"].values()]
    assert right == [tiny_classify.CLASSES[i % 3] for i in range(5)]
    assert {name: c["clips"] for name, c in row["by_class"].items()} == {
        "circle": 2,
        "left": 2,
        "right": 1,
    }


def test_stopped_in_mid_epoch_and_resumed_equals_unbroken(films, tmp_path):
    manifest, run = films
    stopped = _config(manifest, stop_after=4)
    assert loop.train(stopped, tmp_path).reason == "stopped"
    assert loop.train(_config(manifest, stop_after=4), tmp_path).step == 8
    assert _losses(tmp_path) == _losses(run)[:8]


def test_its_encoder_can_be_probed(films, capsys):
    _, run = films
    assert cli.main(["eval", "--ckpt", str(run), "--no-random", "--batch-size", "4"]) == 0
    assert str(run) in capsys.readouterr().out
    with pytest.raises(ConfigError, match="stage 'toy': the probe reads"):
        encoder_of({}, {"stage": "toy"})


def test_labels_that_do_not_fit_are_named(films, tmp_path):
    manifest, _ = films
    wrong = {"label": "action"}
    with pytest.raises(DataError, match=r"no clip has a label 'action'.*'motion'"):
        next(_config(manifest, **wrong).make_stage().train_batches(0))
    config = _config(manifest, classes=["circle", "lefty", "right"])
    with pytest.raises(DataError, match="motion 'left' is no class"):
        next(config.make_stage().train_batches(0))


# -- starting weights -----------------------------------------------------------------------------


def _random(config, seed):
    rng = np.random.default_rng(seed)
    abstract = kinds.of(config).abstract_params(config)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)


def _assert_equal(got, wanted):
    got, wanted = (traverse_util.flatten_dict(tree, sep="/") for tree in (got, wanted))
    assert got.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_allclose(got[path], value, atol=1e-6, err_msg=path)


def test_encoder_of_a_student_with_other_frames_and_pictures(tmp_path):
    target = tiny_classify.model()
    encoder = dataclasses.replace(target.encoder, num_frames=8, image_size=56)
    source = dataclasses.replace(zoo.get("test_tiny_pretrain"), encoder=encoder)
    params = _random(source, 0)
    path = str(load.save_checkpoint(params, source, tmp_path / "s1", source="test"))
    found = init_towers.assemble([TowerInit("vision", path)], target)
    wanted = recipes.fit_encoder(params["encoder"], encoder, target.encoder)
    _assert_equal(found.params, {"encoder": wanted})
    assert "positions 8x4x4 -> 4x2x2 patches" in found.lines[0]
    assert "head/kernel x1" in found.lines[1]


def test_classes_of_another_classifier(tmp_path):
    target = tiny_classify.model()
    encoder = dataclasses.replace(target.encoder, num_frames=2)
    source = dataclasses.replace(target, encoder=encoder, num_classes=5)
    params = _random(source, 1)
    path = str(load.save_checkpoint(params, source, tmp_path / "k710", source="test"))

    def taken(**rows):
        return init_towers.assemble([TowerInit("model", path, **rows)], target).params

    for rows, chosen in (("first", [0, 1, 2]), (str(tmp_path / "rows.json"), [4, 0, 2])):
        (tmp_path / "rows.json").write_text("[4, 0, 2]")
        wanted = recipes.classifier_to_classifier(params, source, target, rows=chosen)
        _assert_equal(taken(rows=rows), wanted)
    fresh = taken(rows="fresh")
    assert "head" not in fresh
    np.testing.assert_array_equal(fresh["fc_norm"]["scale"], params["fc_norm"]["scale"])
    with pytest.raises(CheckpointError, match="has 5 classes, the model 3: set `rows`"):
        taken()
    (tmp_path / "rows.json").write_text("[4, 0, 9]")
    with pytest.raises(ConfigError, match=r"\[9\] are no rows of a head of 5 classes"):
        taken(rows=str(tmp_path / "rows.json"))
    with pytest.raises(ConfigError, match="rows belongs to tower 'model'"):
        TowerInit("vision", path, rows="first")
    other = StudentConfig(encoder, None, None, final_width=0, final_decoder="linear")
    path = str(load.save_checkpoint(_random(other, 2), other, tmp_path / "s", source="test"))
    with pytest.raises(CheckpointError, match="has no classes"):
        taken()


def test_a_run_starts_from_a_run(films, tmp_path):
    _, run = films
    params, _ = checkpoint.load_params(run)
    config = tiny_classify.config(init=[{"tower": "vision", "path": str(run)}])
    stage = config.make_stage()
    given = stage.starting_params()
    np.testing.assert_array_equal(given["encoder"]["cls_token"], params["encoder"]["cls_token"])
    assert given.keys() == {"encoder"}
    assert meta.unbox(jax.eval_shape(stage.init_params, jax.random.key(0))).keys() == params.keys()
