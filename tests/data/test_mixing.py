"""Mixed media: the same batches for any hosts, workers and start, and what is in them."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import multiprocessing

import numpy as np
import pytest

from iv2_jax.data import mixing
from iv2_jax.data.mixing import MixConfig, Schedule, make_mixed_loader
from iv2_jax.errors import ConfigError, DataError
from tests.data import clips, multimodal

_MEDIA = ("audio", "audio_video", "image", "text", "video")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return multimodal.write_lists(tmp_path_factory.mktemp("mixed"))


def _batches(config, *, steps=9, **options):
    settings = {"seed": 5, "global_batch": 4} | options
    with make_mixed_loader(config, **settings) as loader:
        return list(itertools.islice(loader, steps))


def _mix(data, media=_MEDIA, *, workers=0, **options):
    chosen = {m: dataclasses.replace(data[m], num_workers=workers) for m in media}
    return MixConfig(chosen, **options)


def _padded(data, **options):
    return _mix(data, mode="padded", **options)


def _assert_same(ours, reference):
    assert len(ours) == len(reference) > 0
    for a, b in zip(ours, reference, strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_alternate_batches_have_what_their_media_type_has(data):
    seen = {}
    for batch in _batches(_mix(data)):
        seen.setdefault(batch["media"], batch)
    assert set(seen) == set(_MEDIA)
    both = {"index", "replaced", "media", "match_id", "text_video", "text_avs"}
    pictures, sound = {"video"}, {"fbank", "has_audio"}
    extra = {"video": pictures, "image": pictures, "text": set(), "audio": sound}
    extra["audio_video"] = pictures | sound
    for media, batch in seen.items():
        assert set(batch) == both | extra[media], media
        assert batch["text_video"].shape == (4, 8)
        assert batch["text_video"].dtype == np.int32
    assert seen["image"]["video"].shape == (4, 1, 16, 16, 3)
    assert seen["video"]["video"].shape == (4, 2, 16, 16, 3)
    assert seen["audio"]["fbank"].shape == (4, 48, 16)
    assert seen["audio"]["has_audio"].all()
    av = seen["audio_video"]
    np.testing.assert_array_equal(av["has_audio"], av["index"] % 2 == 0)
    assert (av["fbank"][~av["has_audio"]] == 0).all()
    assert np.abs(av["fbank"][av["has_audio"]]).max() > 0.1
    assert (seen["image"]["text_avs"] == multimodal.PAD).all()
    assert (seen["video"]["text_avs"][:, 0] == multimodal.CLS).all()


@pytest.mark.parametrize("mode", ["alternate", "padded"])
@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_is_starting_at_the_step(data, mode, workers):
    media = _MEDIA if not workers else ("audio_video", "image")
    sizes = {"global_batch": 8 if mode == "padded" else 4}
    whole = _batches(_mix(data, media, mode=mode), steps=7, **sizes)
    for start in (4,) if workers else (3, 6):
        config = _mix(data, media, mode=mode, workers=workers)
        resumed = _batches(config, steps=7 - start, start_step=start, **sizes)
        _assert_same(resumed, whole[start:])


@pytest.mark.parametrize("mode", ["alternate", "padded"])
def test_hosts_share_the_rows_of_every_batch(data, mode):
    config = _mix(data, mode=mode)
    whole = _batches(config, global_batch=8)
    parts = [
        _batches(config, global_batch=8, process_index=p, process_count=2, start_step=0)
        for p in range(2)
    ]
    for step, batch in enumerate(whole):
        halves = [part[step] for part in parts]
        assert {half["media"] for half in halves} == {batch["media"]}
        for name in set(batch) - {"media"}:
            joined = np.concatenate([half[name] for half in halves])
            np.testing.assert_array_equal(joined, batch[name], err_msg=name)


def test_a_host_that_resumes_agrees_with_one_that_does_not(data):
    config = _mix(data)
    whole = _batches(config, process_index=1, process_count=2)
    _assert_same(
        _batches(config, steps=4, process_index=1, process_count=2, start_step=5), whole[5:]
    )


def test_an_epoch_shows_every_list_once(data):
    config = _mix(data)
    with make_mixed_loader(config, seed=1, global_batch=2) as loader:
        # 6, 6, 5, 4 and 3 clips in batches of 2.
        assert loader.epoch_steps == 3 + 3 + 2 + 2 + 1
        media = [next(loader)["media"] for _ in range(2 * loader.epoch_steps)]
    first, second = media[:11], media[11:]
    counts = {"audio": 2, "audio_video": 3, "image": 2, "text": 1, "video": 3}
    assert collections.Counter(first) == collections.Counter(second) == counts
    assert first != second


def test_schedule_is_shuffled_by_seed_and_epoch_and_found_at_any_step():
    turns = Schedule({"video": 30, "image": 50, "audio": 1}, seed=2)
    steps = [turns.at(k) for k in range(3 * 81)]
    for name, count in turns.counts.items():
        assert [n for m, n in steps if m == name] == list(range(3 * count))
    assert [m for m, _ in steps[:81]] != [m for m, _ in steps[81:162]]
    other = Schedule({"image": 50, "audio": 1, "video": 30}, seed=2)
    assert [other.at(k) for k in (200, 3, 90)] == [steps[k] for k in (200, 3, 90)]
    for k in (0, 80, 81, 200):
        before = collections.Counter(m for m, _ in steps[:k])
        assert other.position(k) == {name: before[name] for name in turns.counts}
    assert [Schedule(turns.counts, seed=3).at(k) for k in range(81)] != steps[:81]


def test_schedule_of_a_million_steps():
    turns = Schedule({"video": 400_000, "image": 600_000}, seed=0)
    assert sum(turns.position(2_500_000).values()) == 2_500_000


def test_weights_share_out_the_steps(data):
    config = _mix(data, ("video", "image"), weights={"video": 3.0, "image": 1.0})
    with make_mixed_loader(config, seed=1, global_batch=1) as loader:
        assert loader.epoch_steps == 10
        media = collections.Counter(next(loader)["media"] for _ in range(10))
    assert set(media.values()) <= {7, 3, 8, 2}
    assert media["video"] > media["image"]
    shared = mixing.share_out(100, {"a": 1e-6, "b": 2.0, "c": 1.0})
    assert shared["a"] == 1
    assert sum(shared.values()) == 100
    assert abs(shared["b"] - 66) <= 1


def test_batch_sizes_of_their_own(data):
    config = _mix(data, ("video", "image"), batch_sizes={"image": 2})
    sizes = {b["media"]: len(b["index"]) for b in _batches(config, steps=6)}
    assert sizes == {"image": 2, "video": 4}
    with pytest.raises(ConfigError, match="global_batch 2 must be a positive multiple of the 4"):
        make_mixed_loader(config, seed=0, global_batch=4, process_index=0, process_count=4)


def test_padded_batches(data):
    config = _padded(data, batch_sizes=dict.fromkeys(_MEDIA, 2))
    batches = _batches(config, steps=3, global_batch=10)
    for batch in batches:
        assert batch["media"] == "mixed"
        assert batch["video"].shape == (10, 2, 16, 16, 3)
        assert batch["fbank"].shape == (10, 48, 16)
        assert batch["has_video"].sum() == 6
        assert batch["has_audio"].sum() >= 2
        assert (batch["video"][~batch["has_video"]] == 0).all()
        assert (batch["fbank"][~batch["has_audio"]] == 0).all()
        assert (batch["text_video"][:, 0] == multimodal.CLS).all()
        # 5 sounds, 6 clips, 4 pictures, 3 texts, 6 clips, in the order of their types' names.
        types = np.searchsorted([5, 11, 15, 18], batch["match_id"], side="right")
        assert np.bincount(types, minlength=5).tolist() == [2] * 5
        np.testing.assert_array_equal(batch["index"], batch["match_id"])
        np.testing.assert_array_equal(batch["has_video"], np.isin(types, (1, 2, 4)))
        for picture in batch["video"][types == 2]:
            np.testing.assert_array_equal(picture[0], picture[1])
    spread = np.flatnonzero(batches[0]["has_video"])
    assert spread.min() < 5 <= spread.max()  # both halves of the batch have some


def test_padded_rows_are_shared_out_by_length_or_weights(data):
    lengths = _padded(data, media=("video", "text"))
    assert sum(_batches(lengths, steps=1, global_batch=9)[0]["has_video"]) == 6
    weighted = _padded(data, media=("video", "text"), weights={"video": 1.0, "text": 2.0})
    assert sum(_batches(weighted, steps=1, global_batch=9)[0]["has_video"]) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "alternating"}, "mode 'alternating' is not known; did you mean 'alternate'"),
        ({"weights": {"vidoe": 1.0}}, r"weights\.vidoe is not in media; did you mean 'video'"),
        ({"weights": {"video": 1.0}}, "weights lacks image"),
        ({"weights": {"video": 1.0, "image": 0.0}}, r"weights\.image must be above 0"),
        ({"batch_sizes": {"image": 0}}, r"batch_sizes\.image must be at least 1"),
    ],
)
def test_wrong_mixes(data, change, words):
    with pytest.raises(ConfigError, match=words):
        _mix(data, ("video", "image"), **change)


def test_wrong_media(data):
    with pytest.raises(ConfigError, match=r"media\.vidoe is no media type; did you mean 'video'"):
        MixConfig({"vidoe": data["video"]})
    with pytest.raises(ConfigError, match=r"media\.image\.media is 'video'; it must be 'image'"):
        MixConfig({"image": data["video"]})
    with pytest.raises(ConfigError, match="media is empty"):
        MixConfig({})


def test_padded_types_must_fit_each_other(data):
    longer = dataclasses.replace(data["audio_video"], num_frames=4)
    with pytest.raises(ConfigError, match=r"media\.video: video of \(2, 16, 16, 3\) is unlike"):
        _batches(MixConfig({"video": data["video"], "audio_video": longer}, mode="padded"))
    larger = dataclasses.replace(data["image"], size=32)
    with pytest.raises(ConfigError, match=r"media\.\{image,video\}\.size must be equal"):
        _batches(MixConfig({"video": data["video"], "image": larger}, mode="padded"))
    text = dataclasses.replace(data["text"].text, max_length=9)
    other = dataclasses.replace(data["text"], text=text)
    with pytest.raises(ConfigError, match="one tokenizer for all"):
        _batches(MixConfig({"video": data["video"], "text": other}, mode="padded"))
    with pytest.raises(ConfigError, match="batch_sizes take 3 of 4 rows"):
        _batches(_padded(data, batch_sizes={"video": 3}))


def test_bad_clips_of_a_padded_batch_are_replaced_within_their_type(data, tmp_path):
    records = [{"path": f"n{i}.png", "captions": "a"} for i in range(3)]
    multimodal.write_picture(tmp_path / "n1.png", 1)
    path = clips.write_manifest(tmp_path / "m.jsonl", records)
    image = dataclasses.replace(data["image"], source=str(path), max_bad_share=1.0)
    config = MixConfig({"image": image, "text": data["text"]}, mode="padded")
    batches = _batches(config, steps=4)
    for batch in batches:
        assert set(batch["index"][batch["has_video"]]) == {1}
    assert max(b["replaced"].max() for b in batches) == 2


def test_an_error_ends_the_workers_of_all_types(data, tmp_path):
    path = clips.write_manifest(tmp_path / "m.jsonl", [{"path": "none.png", "captions": "a"}])
    image = dataclasses.replace(data["image"], source=str(path))
    video = dataclasses.replace(data["video"], num_workers=1)
    before = set(multiprocessing.active_children())
    config = MixConfig({"image": image, "video": video}, weights={"image": 1.0, "video": 3.0})
    with (
        pytest.raises(DataError, match=r"1 clips in a row do not decode.*none\.png"),
        make_mixed_loader(config, seed=0, global_batch=2) as loader,
    ):
        list(itertools.islice(loader, 100))
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(StopIteration):
        next(loader)
