"""Clips kept in memory."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from iv2_jax.data import rows
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.kept import KeptClips
from iv2_jax.data.pipeline import make_loader
from iv2_jax.errors import ConfigError
from tests.data import clips


def test_what_fits_is_kept_and_the_rest_is_not():
    kept = KeptClips(100)
    kept.put(3, {"a": np.zeros(60, np.uint8)})
    kept.put(4, {"a": np.zeros(60, np.uint8)})
    kept.put(5, {"a": np.zeros(40, np.uint8)})
    assert kept.get(3)["a"].shape == (60,)
    assert kept.get(4) is None
    assert len(kept) == 2


def test_a_worker_starts_empty_with_all_the_room():
    kept = KeptClips(100)
    kept.put(3, {"a": np.zeros(60, np.uint8)})
    copy = pickle.loads(pickle.dumps(kept))
    assert len(copy) == 0
    copy.put(1, {"a": np.zeros(100, np.uint8)})
    assert len(copy) == 1


def test_what_was_given_can_be_added_to():
    kept = KeptClips(100)
    kept.put(3, {"a": np.zeros(6, np.uint8)})
    kept.get(3)["b"] = np.ones(1)
    assert kept.get(3).keys() == {"a"}


def write_list(folder):
    for i in range(3):
        clips.write_clip(folder / f"{i}.mp4", range(20 * i, 20 * i + 16))
    path = folder / "list.csv"
    path.write_text("".join(f"{folder}/{i}.mp4 0\n" for i in range(3)))
    return path


def read(config, steps):
    with make_loader(config, seed=0, global_batch=2, num_steps=steps) as loader:
        return list(loader)


def test_kept_clips_are_decoded_once_and_give_the_same_batches(tmp_path, monkeypatch):
    config = DataConfig(
        source=str(write_list(tmp_path)),
        num_frames=4,
        size=32,
        sampling="dense",
        augment="center",
        fixed_view=True,
        threads=0,
    )
    expected = read(config, 6)
    decoded = []
    load_views = rows.load_views
    monkeypatch.setattr(
        rows, "load_views", lambda *args, **kw: decoded.append(1) or load_views(*args, **kw)
    )
    kept = read(dataclasses.replace(config, keep_gb=1.0), 6)
    assert len(decoded) == 3
    for a, b in zip(expected, kept, strict=True):
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_views_that_differ_are_not_kept():
    with pytest.raises(ConfigError, match="fixed_view"):
        DataConfig(keep_gb=1.0)


def test_kept_views_are_drawn_once_and_shown_in_any_order(tmp_path, monkeypatch):
    config = DataConfig(
        source=str(write_list(tmp_path)),
        num_frames=4,
        size=32,
        augment="random_resized_crop",
        flip=False,
        keep_views=3,
        threads=0,
    )
    expected = read(config, 12)
    decoded = []
    load_views = rows.load_views
    monkeypatch.setattr(
        rows, "load_views", lambda *args, **kw: decoded.append(1) or load_views(*args, **kw)
    )
    kept = read(dataclasses.replace(config, keep_gb=1.0), 12)
    for a, b in zip(expected, kept, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    shown = {
        (int(i), v.tobytes()) for b in kept for i, v in zip(b["index"], b["video"], strict=True)
    }
    assert 3 < len(shown) <= 9  # more than one view a clip, no more than three
    assert len(decoded) == len(shown)


@pytest.mark.parametrize("changes", [{"flip": True}, {"fixed_view": True, "augment": "center"}])
def test_kept_views_must_be_the_same_at_every_visit(changes):
    with pytest.raises(ConfigError, match="keep_views needs"):
        DataConfig(**{"flip": False, "keep_views": 2, "augment": "random_resized_crop"} | changes)
