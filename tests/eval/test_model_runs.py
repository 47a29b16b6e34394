"""Models out of runs: their held-out clips, what they started with, and what is laid on top."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError
from iv2_jax.eval import model_runs
from iv2_jax.interop.export import export_model
from iv2_jax.interop.load import save_checkpoint
from iv2_jax.models import clip, stage2
from iv2_jax.models.student import StudentConfig
from tests.eval import two_towers

VISUAL = stage2.ZOO["test_tiny_stage2"]


def _run(folder, config, values):
    """A workdir whose checkpoint's config is that of a run."""
    workdir = folder / values["stage"]
    save_checkpoint(two_towers.params_of(config), config, workdir, source="here")
    (path,) = workdir.rglob("config/metadata")
    path.write_text(json.dumps(config_lib.to_dict(values)))
    return str(workdir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return two_towers.write_set(tmp_path_factory.mktemp("set")).parent


def _values(folder, stage, **model):
    train = two_towers.data_config(folder, eval=False, split="train")
    return {
        "stage": stage,
        "seed": 3,
        "steps": 1,
        "batch_size": 2,
        "data": {"media": {"video": train}},
        "eval_data": two_towers.data_config(folder),
    } | model


def test_a_run_of_stage_2_and_its_step_0(folder):
    path = _run(folder, VISUAL, _values(folder, "align", stage2=VISUAL))
    model = model_runs.load_model(path)
    assert (model.config, model.seed, model.trained) == (VISUAL, 3, True)
    assert model.data == two_towers.data_config(folder)
    before = model_runs.at_step_0(path)
    assert not before.trained
    expected = model_runs.fresh_params(VISUAL, 3)
    jax.tree.map(np.testing.assert_array_equal, before.params, expected)


def test_an_exported_folder(tmp_path):
    params = two_towers.params_of(VISUAL)
    export_model(params, VISUAL, tmp_path / "exported")
    model = model_runs.load_model(str(tmp_path / "exported"))
    assert (model.config, model.data) == (VISUAL, None)
    jax.tree.map(np.testing.assert_array_equal, model.params, jax.device_get(params))


def test_a_run_of_clip(folder):
    config = clip.ZOO["test_tiny_clip_small"]
    values = _values(folder, "clip", clip_small=config)
    model = model_runs.load_model(_run(folder, config, values))
    assert model.config == config
    data = model_runs.evaluation_set(
        model,
        source="other.json",
        split="",
        media="image",
        tokenizer="mobileclip:",
        max_length=12,
        captions=["image"],
        join=True,
    )
    assert (data.source, data.split, data.media) == ("other.json", None, "image")
    text = data.text
    assert (text.tokenizer, text.path, text.max_length) == ("mobileclip", "", 12)
    assert (text.captions, text.choice) == (("image",), "join")


def test_training_clips_stand_in_where_a_run_names_no_others(folder):
    values = _values(folder, "align", stage2=VISUAL) | {"eval_data": None}
    model = model_runs.load_model(_run(folder / "none", VISUAL, values))
    assert model.data.split == "train"
    assert model_runs.evaluation_set(model, split="test").split == "test"


def test_other_models_are_refused(folder):
    student = StudentConfig(VISUAL.vision.encoder, None, None, 0, "linear")
    save_checkpoint(two_towers.params_of(student), student, folder / "student", source="here")
    with pytest.raises(ConfigError, match="kind 'student'; this task needs stage2"):
        model_runs.load_model(str(folder / "student"))
