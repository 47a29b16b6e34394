"""The loader of instruction tuning: resuming, processes, workers, sizes of tiled files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from iv2_jax.data.instruct import loading
from iv2_jax.data.instruct.conversations import Medium
from iv2_jax.data.instruct.loading import LoadConfig, make_talk_loader, open_talks
from iv2_jax.data.instruct.plan import RowConfig
from iv2_jax.data.instruct.sequence import SequenceConfig
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.tiles import TilingConfig
from iv2_jax.errors import ConfigError
from tests.train import tiny_instruct as tiny

ROWS = RowConfig("pack", (128,), (4,), max_segments=4, global_batch=2)
LOAD = LoadConfig(threads=0)


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    tiny.write_tokenizer(folder / "tok")
    mix = tiny.write_talks(folder / "data", kinds="video,image,text")
    sequence = SequenceConfig(max_length=128, tokens_per_view=3)
    return TalkConfig(str(folder / "tok"), sequence, frames=2, size=28), str(mix)


def _batches(talk, count, load=LOAD, start_step=0, **process):
    config, mix = talk
    tokens = open_talks(config, mix, ROWS, load, seed=3, **process)
    with make_talk_loader(tokens, config, load, seed=3, start_step=start_step, **process) as loader:
        return [next(loader) for _ in range(count)]


def _same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def test_resuming_and_processes_give_the_same_rows(talk):
    whole = _batches(talk, 5)
    assert {b["media"] for b in whole} == {"video-128x4", "image-128x4", "text-128"}
    for one, other in zip(_batches(talk, 3, start_step=2), whole[2:], strict=True):
        _same(one, other)
    halves = [_batches(talk, 5, process_index=p, process_count=2) for p in range(2)]
    for first, second, both in zip(*halves, whole, strict=True):
        for name in ("tokens", "targets", "segment_ids", *({"video"} & both.keys())):
            np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), both[name])


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(talk):
    load = dataclasses.replace(LOAD, num_workers=2, prefetch=1)
    for one, other in zip(_batches(talk, 4, load), _batches(talk, 4), strict=True):
        _same(one, other)


def test_tiled_files_are_opened_once(talk, tmp_path, monkeypatch):
    folder = talk[1].rpartition("/")[0]
    media = [Medium("video", f"{folder}/0.mp4"), Medium("image", f"{folder}/p.png")]
    media.append(Medium("video", f"{folder}/no.mp4"))
    tiling, cache = TilingConfig(28), str(tmp_path / "frames.json")
    views = loading.tiled_views(tiling, media, cache)
    assert [views(m) for m in media] == [7, 7, 2]  # 64 x 48: a grid of 3 x 2; one that is not there
    assert json.loads((tmp_path / "frames.json").read_text())[media[0].path] == [48, 64]
    monkeypatch.setattr(loading, "frame_size", None)
    again = loading.tiled_views(tiling, media, cache)
    assert [again(m) for m in media] == [7, 7, 2]
    fixed = loading.tiled_views(TilingConfig(28, fixed_grid=(2, 1)), media)
    assert fixed(media[0]) == 3


def test_a_talk_that_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match=r"needs talk\.bridge_tokenizer"):
        TalkConfig("x", bridge_text="instruction")
    with pytest.raises(ConfigError, match=r"bridge_text 'instructions'.*instruction"):
        TalkConfig("x", bridge_text="instructions")
    with pytest.raises(ConfigError, match=r"talk\.size=224 is not talk\.tiling\.tile_size=28"):
        TalkConfig("x", tiling=TilingConfig(28))
    with pytest.raises(ConfigError, match="no view of 'sound'"):
        TalkConfig("x").view_config("sound")
    assert TalkConfig("x").view_config("image").frames == 1
