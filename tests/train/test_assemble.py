"""`iv2 assemble`: a config's starting weights as a checkpoint, and what it says of them."""

from __future__ import annotations

import json

import numpy as np
from flax import traverse_util

from iv2_jax import cli
from iv2_jax.interop import families, load, run_config
from iv2_jax.models import zoo
from iv2_jax.train import checkpoint
from tests.interop.family_cases import random_tree
from tests.train import tiny_clip


def test_starting_weights_become_a_checkpoint(tmp_path, capsys):
    stage2 = zoo.get("test_tiny_stage2")
    params = random_tree(families.of(stage2).entries(stage2), 1)
    source = load.save_checkpoint(params, stage2, tmp_path / "stage2", source="test")
    clip = zoo.get("test_tiny_clip_small")
    values = tiny_clip.values(clip, init=[{"tower": "vision", "path": "not yet"}])
    (tmp_path / "run.json").write_text(json.dumps(values))
    arguments = ["assemble", "--config", str(tmp_path / "run.json")]
    path = f"--config.init.0.path={source}"
    assert cli.main([*arguments, "--out", str(tmp_path / "start"), path]) == 0
    said = capsys.readouterr().out
    assert f"vision <- {source}: " in said
    assert "fresh: " in said
    assert "vision_align/" in said
    got, config = checkpoint.load_params(tmp_path / "start")
    assert run_config.read_run(config) == clip
    flat = traverse_util.flatten_dict(got, sep="/")
    wanted = traverse_util.flatten_dict(params["vision_encoder"]["encoder"], sep="/")
    for name, value in flat.items():
        if name.startswith("vision_encoder/"):
            np.testing.assert_array_equal(value, wanted[name.removeprefix("vision_encoder/")])
    assert float(flat["temp"]) == np.float32(clip.temp_init)
    # A second one does not overwrite it, and a config without weights to start from is refused.
    assert cli.main([*arguments, "--out", str(tmp_path / "start"), path]) == 2
    assert "not empty" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps(tiny_clip.values(clip)))
    assert cli.main([*arguments, "--out", str(tmp_path / "other")]) == 2
    assert "config.init names no weights" in capsys.readouterr().err
