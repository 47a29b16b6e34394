"""Rows with captions and sound: which caption, what is masked, what is hostile."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from iv2_jax.data import corpora, pipeline, row_texts, sources
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.modalities import AudioConfig, CorpusConfig
from iv2_jax.data.row_texts import RowTexts
from iv2_jax.errors import ConfigError, DataError
from tests.data import clips, multimodal


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return multimodal.write_lists(tmp_path_factory.mktemp("lists"))


def _batches(config, *, steps=3, **options):
    settings = {"seed": 3, "global_batch": 4} | options
    with pipeline.make_loader(config, num_steps=steps, **settings) as loader:
        batches = list(loader)
    return batches, loader


def _eval(config, **changes):
    return dataclasses.replace(config, eval=True, augment="stretch", **changes)


def _decoded(config, batch, name="video"):
    tokenizer = row_texts.load_tokenizer(config.text)
    return [tokenizer.decode(row) for row in batch[f"text_{name}"]]


def _list(tmp_path, config, records, **text):
    """A config of records with captions."""
    path = clips.write_manifest(tmp_path / "m.jsonl", records)
    text = dataclasses.replace(config.text, **text)
    return dataclasses.replace(config, source=str(path), text=text)


# -- captions -------------------------------------------------------------------------------------


def test_choice_of_a_caption(data):
    random = data["video"]
    texts = {}
    for batch in _batches(random, steps=12)[0]:
        for index, text in zip(batch["index"], _decoded(random, batch), strict=True):
            texts.setdefault(int(index), set()).add(text)
    both = [{f"a dog number {i}", f"a cat number {i}"} for i in range(6)]
    assert sum(texts[i] == both[i] for i in range(6)) >= 4
    assert all(texts[i] <= both[i] for i in range(6))
    for choice, expected in (("first", "a dog number {}"), ("join", "a dog number {0} a cat")):
        text = dataclasses.replace(random.text, choice=choice)
        config = dataclasses.replace(random, text=text)
        (batch,) = _batches(config, steps=1)[0]
        for index, found in zip(batch["index"], _decoded(config, batch), strict=True):
            assert found.startswith(expected.format(index))


def test_evaluation_takes_the_first_caption_every_time(data):
    config = _eval(data["video"])
    with pipeline.make_loader(config, seed=9, global_batch=4) as loader:
        batches = list(loader)
    assert _decoded(config, batches[0]) == [f"a dog number {i}" for i in range(4)]
    last = batches[1]
    assert last["valid"].tolist() == [True, True, False, False]
    assert last["match_id"].tolist() == [4, 5, -1, -1]
    assert (last["text_video"][2:] == multimodal.PAD).all()


def test_hostile_captions(data, tmp_path):
    long = "dog " * 10_000
    records = [
        {"path": "empty", "captions": ""},
        {"path": "emoji", "captions": "\U0001f600\U0001f468‍\U0001f469‍\U0001f467 dog"},
        {"path": "long", "captions": long},
        {"path": "half", "captions": "\ud83d dog"},
        {"path": "none"},
        {"path": "other", "captions": {"audio": "rain"}},
    ]
    for record in records:
        clips.write_clip(tmp_path / f"{record['path']}.mp4", 4)
        record["path"] += ".mp4"
    config = _eval(_list(tmp_path, data["video"], records, captions=("video", "audio")))
    (batch,) = _batches(config, steps=1, global_batch=6)[0]
    assert batch["valid"].all()
    text = batch["text_video"]
    cls, pad = multimodal.CLS, multimodal.PAD
    assert text[0].tolist() == [cls] + [pad] * 7
    assert _decoded(config, batch)[1].endswith("dog")
    assert _decoded(config, batch)[2] == "dog " * 6 + "dog"
    assert _decoded(config, batch)[3].endswith("dog")
    assert (text[4:] == pad).all()
    assert (batch["text_audio"][:5] == pad).all()
    assert _decoded(config, batch, "audio")[5] == "rain"
    again = dataclasses.replace(config, num_workers=1)
    np.testing.assert_array_equal(
        _batches(again, steps=1, global_batch=6)[0][0]["text_video"], text
    )


def test_prompts_cleaning_and_words(data):
    texts = RowTexts(corpora.open_data(data["video"]), data["video"].text)
    assert texts.prepare("A Dog, (runs)!") == "a dog runs"
    raw = dataclasses.replace(data["video"].text, clean=False, max_words=2, prompt="photo of {}")
    texts = RowTexts(corpora.open_data(data["video"]), raw)
    assert texts.pick(0, None) == {"video": "photo of", "avs": "photo of"}
    whole = dataclasses.replace(raw, max_words=0, clean=True)
    texts = RowTexts(corpora.open_data(data["video"]), whole)
    assert texts.pick(1, None)["avs"] == "photo of barks 1"
    drawn = dataclasses.replace(whole, prompt="action")
    texts = RowTexts(corpora.open_data(data["video"]), drawn)
    rng = np.random.default_rng(0)
    assert len({texts.pick(1, rng)["avs"] for _ in range(60)}) > 8


def test_short_captions_are_left_out_and_said(data, tmp_path, capfd):
    captions = [["a"], ["a", "a dog runs"], "dog cat", [], ["x, y"]]
    records = [{"path": f"v{i}.mp4", "captions": c} for i, c in enumerate(captions)]
    for i in range(5):
        clips.write_clip(tmp_path / f"v{i}.mp4", 4)
    config = _list(tmp_path, data["video"], records, min_words=2, captions=("video",))
    source = corpora.open_data(config)
    assert "2 of 5 clips left out" in capfd.readouterr().err
    assert [clip.path[-6:] for clip in source.clips] == ["v1.mp4", "v2.mp4", "v4.mp4"]
    texts = RowTexts(source, config.text)
    assert texts.texts("video", 0) == ["a dog runs"]
    batches, _ = _batches(config)
    assert {int(i) for b in batches for i in b["index"]} == {0, 1, 2}
    with pytest.raises(DataError, match=r"no clip has a caption of data\.text\.min_words words"):
        corpora.open_data(_list(tmp_path, data["video"], records, min_words=9))


def test_mirrored_only_where_no_caption_names_a_side(data, tmp_path):
    Image.fromarray(
        np.repeat(np.arange(16, dtype=np.uint8)[None, :, None] * 16, 16, 0).repeat(3, 2)
    ).save(tmp_path / "ramp.png")
    records = [{"path": "ramp.png", "captions": "a dog runs left"}]
    config = _list(tmp_path, data["image"], records)
    mirrored = {}
    for released in (False, True):
        chosen = dataclasses.replace(config, released_flip=released)
        video = np.concatenate([b["video"] for b in _batches(chosen, steps=4)[0]]).astype(int)
        mirrored[released] = (video[:, 0, 8, 0, 0] > video[:, 0, 8, -1, 0]).sum()
    assert mirrored[False] == 0
    assert 3 <= mirrored[True] <= 13


def test_captions_do_not_depend_on_pictures(data):
    one, _ = _batches(data["video"])
    other, _ = _batches(dataclasses.replace(data["video"], num_frames=1, augment="center"))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a["text_video"], b["text_video"])


def test_a_million_captions_are_cheap_for_a_worker(tmp_path, data):
    clip = sources.Clip("a", "x.mp4", captions={"video": ("a dog runs",), "avs": ("b",)})
    texts = RowTexts(sources.FileSource([clip] * 20_000), data["video"].text)
    pickled = pickle.dumps(texts)
    # Eleven letters and a few offsets a clip, no objects.
    assert len(pickled) < 20_000 * 64 + 100_000
    assert pickle.loads(pickled).texts("video", 19_999) == ["a dog runs"]


def test_match_ids(data, tmp_path):
    records = [
        {"path": p, "captions": "a", "start": s, "end": s + 0.1}
        for p, s in (("a.mp4", 0.0), ("b.mp4", 0.0), ("a.mp4", 0.1))
    ]
    config = _list(tmp_path, data["video"], records)
    source = corpora.open_data(config)
    assert corpora.match_ids(source, config).tolist() == [0, 1, 2]
    by_path = dataclasses.replace(config, match="path")
    assert corpora.match_ids(source, by_path).tolist() == [0, 1, 0]


# -- several lists --------------------------------------------------------------------------------


def _corpora(data, **changes):
    video = data["video"]
    lists = (
        CorpusConfig(video.source, captions={"video": "avs"}, weight=2.0, prompt="a {}"),
        CorpusConfig(video.source, **changes),
    )
    text = dataclasses.replace(video.text, captions=("video",))
    return dataclasses.replace(video, source="", corpora=lists, text=text)


def test_lists_are_joined_with_weights_and_settings_of_their_own(data):
    config = _corpora(data, choice="join")
    batches, loader = _batches(config, steps=9, global_batch=2)
    index = np.concatenate([b["index"] for b in batches])
    # An epoch: 6 clips twice, then 6 once.
    assert np.bincount(index, minlength=12).tolist() == [2] * 6 + [1] * 6
    np.testing.assert_array_equal(np.concatenate([b["match_id"] for b in batches]), index)
    for batch in batches:
        for i, text in zip(batch["index"], _decoded(config, batch), strict=True):
            assert text.startswith(f"a barks {i}" if i < 6 else f"a dog number {i - 6} a cat")
    assert len(loader.source.clips) == 12
    parallel = dataclasses.replace(config, num_workers=1)
    np.testing.assert_array_equal(
        _batches(parallel, steps=3)[0][2]["text_video"],
        _batches(config, steps=3)[0][2]["text_video"],
    )
    released = dataclasses.replace(config, released_match_ids=True)
    assert corpora.match_ids(loader.source, released).tolist() == [*range(6), *range(6)]


def test_whole_weights_put_copies_side_by_side():
    spread = corpora.Spread([3, 2], [2.0, 1.0])
    for epoch in (0, 1):
        assert [spread.clip(i, epoch) for i in range(len(spread))] == [0, 0, 1, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("weight", [0.3, 0.5, 1.5, 2.7])
def test_every_clip_gets_its_share_over_epochs(weight):
    spread = corpora.Spread([10, 1], [weight, 1.0])
    shown = np.zeros(11, int)
    for epoch in range(10):
        places = [spread.clip(i, epoch) for i in range(len(spread))]
        assert places == sorted(places)
        shown += np.bincount(places, minlength=11)
    assert shown[10] == 10
    assert shown[:10].sum() == 10 * int(10 * weight + 1e-9)
    assert np.ptp(shown[:10]) <= 1


def test_first_seconds_and_class_names_of_a_list(data, tmp_path):
    clips.write_clip(tmp_path / "a.mp4", 50)
    path = clips.write_manifest(tmp_path / "m.jsonl", [{"path": "a.mp4", "captions": "dog runs"}])
    corpus = CorpusConfig(str(path), seconds=0.4, label=True)
    source = corpora.open_data(dataclasses.replace(data["video"], source="", corpora=(corpus,)))
    frames = source.open(0)
    assert len(frames) == 10
    frames.close()
    assert source.clips[0].labels == {"label": "dog runs"}


# -- sound ----------------------------------------------------------------------------------------


def test_missing_silent_and_broken_sound(data, tmp_path, capfd):
    silence = multimodal.write_wav(tmp_path / "silence.wav", level=0)
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF" + bytes(40))
    good = multimodal.write_wav(tmp_path / "good.wav")
    sounds = [silence, broken, None, good]
    records = []
    for i, sound in enumerate(sounds):
        clips.write_clip(tmp_path / f"v{i}.mp4", 4)
        extra = {} if sound is None else {"sound": sound.name}
        records.append({"path": f"v{i}.mp4", "captions": "a dog", **extra})
    config = _eval(_list(tmp_path, data["audio_video"], records))
    (batch,), loader = _batches(config, steps=1)
    assert batch["valid"].all()
    assert batch["replaced"].sum() == 0
    assert batch["has_audio"].tolist() == [False, False, False, True]
    assert set(batch) == {
        *("video", "fbank", "has_audio", "text_video", "text_avs"),
        *("index", "replaced", "match_id", "valid"),
    }
    assert (batch["fbank"][:3] == 0).all()
    assert loader.bad_sounds == 1
    err = capfd.readouterr().err
    assert err.count("its sound cannot be used") == 1
    kept = dataclasses.replace(config.audio, silent="keep", missing="zeros")
    (batch,), _ = _batches(dataclasses.replace(config, audio=kept), steps=1)
    assert batch["has_audio"].tolist() == [True] * 4
    assert np.ptp(batch["fbank"][0]) == 0
    assert batch["fbank"][0, 0, 0] == pytest.approx(-2.3917, abs=1e-3)
    assert (batch["fbank"][1:3] == 0).all()


def test_sound_alone_is_replaced_when_it_is_bad(data, tmp_path):
    multimodal.write_wav(tmp_path / "good.wav")
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    clips.write_clip(tmp_path / "mute.mp4", 4)
    records = [{"path": n, "captions": "rain"} for n in ("bad.wav", "good.wav", "mute.mp4")]
    config = dataclasses.replace(_list(tmp_path, data["audio"], records), max_bad_share=1.0)
    batches, _ = _batches(config)
    assert {int(i) for b in batches for i in b["index"]} == {1}
    (batch,), _ = _batches(_eval(config), steps=1)
    assert batch["valid"].tolist() == [False, True, False, False]


def test_padding_follows_where_the_sound_is_from(data, tmp_path):
    multimodal.write_wav(tmp_path / "s.wav", 0.1)
    clips.write_clip(tmp_path / "v.mp4", 4)
    record = {"path": "v.mp4", "captions": "a"}
    (batch,), _ = _batches(
        _eval(_list(tmp_path, data["audio_video"], [record | {"sound": "s.wav"}])),
        steps=1,
        global_batch=1,
    )
    assert batch["fbank"][0, -1, 0] == pytest.approx(-2.3917, abs=1e-3)
    (batch,), _ = _batches(_eval(data["audio_video"]), steps=1, global_batch=1)
    tail = dataclasses.replace(data["audio_video"].audio, seconds=3.0)
    longer = _eval(dataclasses.replace(data["audio_video"], audio=tail))
    (batch,), _ = _batches(longer, steps=1, global_batch=1)
    assert (batch["fbank"][0, 120:] == 0).all()
    assert batch["fbank"].shape == (1, 298, 16)


def test_random_stretches_of_long_sound_differ_by_row_and_not_by_run(data, tmp_path):
    rng = np.random.default_rng(0)
    path = multimodal.write_wav(tmp_path / "s.wav", 2.0)
    raw = bytearray(path.read_bytes())
    raw[44:] = rng.integers(-9000, 9000, (len(raw) - 44) // 2).astype("<i2").tobytes()
    path.write_bytes(bytes(raw))
    config = _list(tmp_path, data["audio"], [{"path": "s.wav", "captions": "rain"}])
    (batch,), _ = _batches(config, steps=1)
    assert not np.array_equal(batch["fbank"][0], batch["fbank"][1])
    np.testing.assert_array_equal(_batches(config, steps=1)[0][0]["fbank"], batch["fbank"])
    first = dataclasses.replace(config, audio=dataclasses.replace(config.audio, crop="first"))
    (batch,), _ = _batches(first, steps=1)
    np.testing.assert_array_equal(batch["fbank"][0], batch["fbank"][1])


# -- pictures -------------------------------------------------------------------------------------


def test_pictures_of_odd_shapes_and_kinds(data, tmp_path, capfd):
    shapes = {"dot": (1, 1), "line": (300, 1), "pole": (1, 300), "wide": (900, 17)}
    for name, size in shapes.items():
        multimodal.write_picture(tmp_path / f"{name}.png", 5, size)
    grey = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.new("RGBA", (20, 30), (200, 10, 10, 0)).save(tmp_path / "clear.png")
    Image.new("P", (20, 30)).save(tmp_path / "palette.png")
    Image.new("CMYK", (20, 30)).save(tmp_path / "print.jpg")
    whole = multimodal.write_picture(tmp_path / "whole.png", 5).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    names = [*(f"{n}.png" for n in shapes), "deep.png", "clear.png", "palette.png", "print.jpg"]
    records = [{"path": n, "captions": "photo"} for n in [*names, "cut.png"]]
    config = _list(tmp_path, data["image"], records)
    (batch,), _ = _batches(_eval(config), steps=1, global_batch=len(records))
    assert batch["video"].shape == (len(records), 1, 16, 16, 3)
    assert batch["valid"].tolist() == [True] * len(names) + [False]
    assert 100 < batch["video"][4].max() <= 255
    assert "cut.png" in capfd.readouterr().err
    trained = dataclasses.replace(config, max_bad_share=1.0)
    _batches(trained, steps=4)


def test_crop_of_a_picture(data, tmp_path):
    multimodal.write_picture(tmp_path / "p.png", 1)  # the leftmost eighth is bright
    records = [
        {"path": "p.png", "captions": "a", "crop": [0, 0, 8, 48]},
        {"path": "p.png", "captions": "a", "crop": [8, 0, 64, 48]},
        {"path": "p.png", "captions": "a", "crop": [70, 0, 80, 48]},
    ]
    config = _eval(_list(tmp_path, data["image"], records))
    (batch,), _ = _batches(config, steps=1, global_batch=3)
    assert batch["video"][0].min() > 200 > 50 > batch["video"][1].max()
    assert batch["valid"].tolist() == [True, True, False]


def test_a_folder_of_frames_as_a_picture(data, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(3):
        multimodal.write_picture(folder / f"f{i}.png", i)
    config = _eval(_list(tmp_path, data["image"], [{"path": "frames", "captions": "a"}]))
    (batch,), _ = _batches(dataclasses.replace(config, size=48), steps=1, global_batch=1)
    assert batch["video"].shape == (1, 1, 48, 48, 3)
    assert clips.numbers(batch["video"][0]) == [1]  # the middle one


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"media": "vidoe"}, "data.media 'vidoe' is not known; did you mean 'video'"),
        ({"media": "audio"}, "data.media='audio' needs data.audio"),
        ({"audio": AudioConfig()}, "data.media='video' has no sound"),
        ({"media": "text", "text": None}, "data.media='text' needs data.text"),
        ({"media": "text", "mask": "tube", "mask_grid": (1, 2, 2)}, "has no pictures"),
        ({"match": "file"}, "data.match 'file' is not known"),
        ({"crop_area": (0.9, 0.5)}, "data.crop_area must be two shares"),
        ({"corpora": (CorpusConfig("x"),)}, "data.source and data.corpora are both given"),
        (
            {"source": "", "corpora": (CorpusConfig("x", captions={"vid": "y"}),)},
            r"x: corpora\[\]\.captions names 'vid'.*did you mean 'video'",
        ),
    ],
)
def test_wrong_settings(data, change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(data["video"], **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "birt"}, "text.tokenizer 'birt' is not known; did you mean 'bert'"),
        ({"choice": "rand"}, "text.choice 'rand' is not known; did you mean 'random'"),
        ({"captions": ("a", "a")}, "must be different names"),
        ({"captions": ()}, "must be different names"),
        ({"prompt": "a video"}, "text.prompt: prompt 'a video' is not known"),
        ({"min_words": -1}, "text.min_words must not be negative"),
    ],
)
def test_wrong_text_settings(data, change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(data["video"].text, **change)


def test_no_source():
    with pytest.raises(ConfigError, match=r"data\.source must be given"):
        pipeline.make_loader(DataConfig(), seed=0, global_batch=1)


def test_frames_at_a_rate(data, tmp_path):
    clips.write_clip(tmp_path / "v.mp4", 30)  # 25 frames a second
    multimodal.write_picture(tmp_path / "p.png", 7)
    records = [{"path": "v.mp4", "captions": "a"}, {"path": "p.png", "captions": "a"}]
    config = _eval(_list(tmp_path, data["video"], records), sampling="fps4", num_frames=4, size=48)
    (batch,), _ = _batches(config, steps=1, global_batch=2)
    assert clips.numbers(batch["video"][0]) == [3, 9, 16, 22]
    assert clips.numbers(batch["video"][1]) == [7] * 4
