"""Pixels of views: the right frames of the right files, tiles, files that do not decode."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.dialogue import IGNORE
from iv2_jax.data.instruct.batches import TokenBatches
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn
from iv2_jax.data.instruct.pictures import ViewLoader, data_of
from iv2_jax.data.instruct.plan import RowConfig
from iv2_jax.data.instruct.sequence import SequenceBuilder, SequenceConfig
from iv2_jax.data.tiles import TilingConfig, hd_views
from iv2_jax.errors import ConfigError, DataError
from tests.data import clips
from tests.data.instruct.words import Letters

DATA = DataConfig(num_frames=4, size=32, augment="stretch", sampling="middle", fixed_view=True)
TILES = TilingConfig(tile_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    clips.write_clip(folder / "a.mp4", range(0, 24), options={"qp": "10"})
    clips.write_clip(folder / "b.mp4", range(100, 150), options={"qp": "10"})
    (folder / "bad.mp4").write_bytes(b"nothing")
    Image.fromarray(clips.picture(200)).save(folder / "c.png")
    return folder


def _source(folder, media, num_views=None, **options):
    talks = [
        Conversation((Turn("q", f"a{at}"),), (medium,) if medium else ())
        for at, medium in enumerate(media)
    ]
    builder = SequenceBuilder(SequenceConfig(tokens_per_view=1), Letters())
    rows = RowConfig("pack", (128,), (10,), global_batch=1, **options)
    more = {} if num_views is None else {"num_views": num_views}
    return TokenBatches(talks, builder, rows, seed=0, **more)


def _shown(source, batch):
    """Numbers of the frames by file name and start."""
    out = {}
    for view, number in enumerate(batch["media"][0].tolist()):
        if number >= 0:
            clip = source.clips[number]
            out[clip.path[-5:], clip.start] = clips.numbers(batch["video"][0, view])
    return out


def test_views_show_their_stretch_of_their_file(folder):
    media = [
        Medium("video", str(folder / "a.mp4")),
        Medium("video", str(folder / "b.mp4"), 1.0, 1.6),
        Medium("video", str(folder / "b.mp4")),
        Medium("image", str(folder / "c.png")),
        None,
    ]
    source = _source(folder, media)
    loader = ViewLoader(source.clips, data_of(DATA), seed=0)
    batches = {b["kind"]: loader.add(b) for b in map(source.__getitem__, range(3))}
    assert batches["video"]["video"].shape == (1, 10, 4, 32, 32, 3)
    assert batches["video"]["video"].dtype == np.uint8
    assert batches["image"]["video"].shape == (1, 10, 1, 32, 32, 3)
    assert "video" not in batches["text"]
    shown = _shown(source, batches["video"])
    assert shown["a.mp4", None] == [2, 8, 14, 20]
    assert all(125 <= n < 140 for n in shown["b.mp4", 1.0])
    assert min(shown["b.mp4", None]) < 110
    assert _shown(source, batches["image"]) == {("c.png", None): [200]}
    assert not batches["video"]["video"][0, 3:].any()
    assert loader.unread == 0


def test_draws_follow_from_the_seed_and_the_epoch(folder):
    source = _source(folder, [Medium("video", str(folder / "b.mp4"))])
    data = DataConfig(num_frames=4, size=32, augment="random_resized_crop", sampling="rand")

    def pixels(step, seed=0):
        return ViewLoader(source.clips, {"video": data}, seed=seed).add(source[step])["video"]

    np.testing.assert_array_equal(pixels(0), pixels(0))
    assert not np.array_equal(pixels(0), pixels(1))
    assert not np.array_equal(pixels(0), pixels(0, seed=1))


def test_nothing_is_mirrored_unless_released(tmp_path):
    Image.fromarray(clips.picture(15)).save(tmp_path / "left.png")  # bright on the left
    source = _source(tmp_path, [Medium("image", str(tmp_path / "left.png"))])

    def bright_left(**options):
        data = DataConfig(num_frames=1, size=32, augment="random_resized_crop", **options)
        loader = ViewLoader(source.clips, data_of(data), seed=0)
        shown = [loader.add(source[step])["video"][0, 0, 0] for step in range(20)]
        return {bool(x[:, :8].mean() > x[:, -8:].mean()) for x in shown}

    assert bright_left(crop_area=(0.9, 1.0)) == {True}
    assert bright_left(crop_area=(0.9, 1.0), released_flip=True) == {True, False}


def test_tiles_and_the_global_view(folder):
    path = folder / "a.mp4"
    views = TILES.grid(clips.HEIGHT, clips.WIDTH).num_views
    source = _source(folder, [Medium("video", str(path))], lambda medium: views)
    loader = ViewLoader(source.clips, {"video": DATA}, seed=0, tiling=TILES)
    video = loader.add(source[0])["video"]
    assert video.shape == (1, 10, 4, 16, 16, 3)
    assert video.dtype == np.float32
    assert views == 7
    frames = np.stack([clips.picture(n) for n in (2, 8, 14, 20)])
    np.testing.assert_allclose(video[0, :7], hd_views(frames, TILES), atol=12)
    assert not video[0, 7:].any()
    twice = Conversation((Turn("q", "a"),), (Medium("video", str(path)),) * 2)
    builder = SequenceBuilder(SequenceConfig(tokens_per_view=1), Letters())
    rows = RowConfig("pack", (256,), (14,), global_batch=1)
    source = TokenBatches([twice], builder, rows, seed=0, num_views=lambda medium: views)
    again = ViewLoader(source.clips, {"video": DATA}, seed=0, tiling=TILES).add(source[0])["video"]
    np.testing.assert_array_equal(again[0, :7], again[0, 7:])
    np.testing.assert_array_equal(again[0, :7], video[0, :7])
    wrong = _source(folder, [Medium("video", str(path))], lambda medium: 3)
    with pytest.raises(DataError, match=r"a.mp4 has 7 views, 3 were planned"):
        ViewLoader(wrong.clips, {"video": DATA}, seed=0, tiling=TILES).add(wrong[0])


def test_a_file_that_does_not_decode_leaves_the_loss(folder, tmp_path):
    media = [Medium("video", str(folder / "bad.mp4")), Medium("video", str(folder / "a.mp4"))]
    source = _source(folder, media)
    log = tmp_path / "bad.jsonl"
    loader = ViewLoader(source.clips, data_of(DATA), seed=0, log=str(log))
    before = source[0]
    batch = loader.add(before)
    bad = next(i for i, clip in enumerate(source.clips) if clip.path.endswith("bad.mp4"))
    segment = batch["view_segment"][0][batch["media"][0] == bad][0]
    place = batch["segment_ids"][0] == segment
    assert (batch["targets"][0][place] == IGNORE).all()
    assert (before["targets"][0][place] != IGNORE).any()
    np.testing.assert_array_equal(batch["targets"][0][~place], before["targets"][0][~place])
    assert loader.unread == 1
    assert "bad.mp4" in json.loads(log.read_text().splitlines()[0])["path"]


def test_wrong_settings(folder):
    source = _source(folder, [Medium("video", str(folder / "a.mp4"))])
    with pytest.raises(ConfigError, match=r"data\['image'\].media is 'video'"):
        ViewLoader(source.clips, {"image": DATA}, seed=0)
    with pytest.raises(ConfigError, match="views and crops must be 1"):
        ViewLoader(source.clips, {"video": DataConfig(views=2)}, seed=0)
    with pytest.raises(ConfigError, match="no settings for 'video'"):
        ViewLoader(source.clips, {}, seed=0).add(source[0])
