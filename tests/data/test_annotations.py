"""The released code's annotation files, in every form (spec stage2 8.3)."""

from __future__ import annotations

import json

import pytest

from iv2_jax.data import annotations, validate
from iv2_jax.data.manifest import read_clips
from iv2_jax.errors import DataError
from tests.data import clips, multimodal


def _write(folder, records, name="anno.json"):
    path = folder / name
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def _read(folder, *records, **options):
    return read_clips(_write(folder, list(records)), **options)


def test_pictures_and_videos(tmp_path):
    picture, boxed, video, many = _read(
        tmp_path,
        {"image": "p.jpg", "caption": "a dog"},
        {"image": "q.jpg", "captions": ["a", "b"], "crop_bbox": [1, 2.5, 30, 40]},
        {"video": "v.mp4", "caption": "a cat"},
        {"video": "w.mp4", "caption": ["x", "y"], "video_name": "w"},
        prefix="/data",
    )
    assert (picture.path, picture.captions) == ("/data/p.jpg", {"video": ("a dog",)})
    assert (boxed.captions["video"], boxed.crop) == (("a", "b"), (1.0, 2.5, 30.0, 40.0))
    assert (video.path, video.captions["video"]) == ("/data/v.mp4", ("a cat",))
    assert many.captions == {"video": ("x", "y")}


def test_frames_become_seconds_and_all_captions_are_kept(tmp_path):
    (clip,) = _read(
        tmp_path,
        {
            "video_name": "n",
            "video": "v.mp4",
            "video_fps": 25.0,
            "video_start_frame": 50,
            "video_end_frame": 175,
            "selected_audio_caption": "hum",
            "selected_video_caption": "dog",
            "asr_captions": "hello",
            "av_captions": None,
            "avs_captions": ["all", "of it"],
            "asr": "hello there",
            "asr_trimmed_30": "hello",
        },
    )
    assert (clip.start, clip.end) == (2.0, 7.0)
    assert clip.captions == {
        "selected_audio_caption": ("hum",),
        "selected_video_caption": ("dog",),
        "asr_captions": ("hello",),
        "avs_captions": ("all", "of it"),
        "asr": ("hello there",),
        "asr_trimmed_30": ("hello",),
    }


def test_sound_alone_and_beside_a_video(tmp_path):
    alone, beside = _read(
        tmp_path,
        {"audio": "s.wav", "caption": "rain"},
        {"video": "v.mp4", "audio": "s.wav", "caption": "street", "avs_captions": "x"},
        prefix="/data",
    )
    assert (alone.path, alone.sound, alone.captions) == ("/data/s.wav", None, {"audio": ("rain",)})
    assert (beside.path, beside.sound) == ("/data/v.mp4", "/data/s.wav")
    assert beside.captions == {"video": ("street",), "avs_captions": ("x",)}


def test_multiple_choice(tmp_path):
    number, hot, five, asked = _read(
        tmp_path,
        {"video": "v.mp4", "option": ["a", "b", "c"], "answer": 2, "caption": "it"},
        {"video": "v.mp4", "option": ["a", "b", "c"], "answer": [1, 0, 1]},
        {"video": "v.mp4", "caption": ["k", "l", "m", "n", "o"], "answer": 3},
        {"video": "v.mp4", "option": ["a", "b"], "answer": 1, "question": "which?"},
    )
    assert (number.options, number.answers) == (("a", "b", "c"), (2,))
    assert number.captions == {"video": ("it",)}
    assert hot.answers == (0, 2)
    assert (five.options, five.answers) == (("k", "l", "m", "n", "o"), (3,))
    assert five.captions == {"video": ("n",)}
    assert (asked.qa, asked.answers) == ((("which?", "b"),), (1,))
    # The same file four times: names of their own.
    assert len({c.id for c in (number, hot, five, asked)}) == 4


def test_questions(tmp_path):
    one, several, image = _read(
        tmp_path,
        {"video": "v.mp4", "question": "who?", "answer": "he", "question_id": 17},
        {"media": "v.mp4", "question": "who?", "answer": ["he", "she"], "question_id": "q2"},
        {"image": "p.png", "question": "what?", "answer": "it"},
    )
    assert (one.id, one.qa) == ("17", (("who?", "he"),))
    assert (several.id, several.qa) == ("q2", (("who?", "he"), ("who?", "she")))
    assert image.qa == (("what?", "it"),)


def test_text_alone_and_one_object_a_line(tmp_path):
    path = clips.write_manifest(tmp_path / "a.json", [{"caption": "x"}, {"caption": ["y", "z"]}])
    first, second = read_clips(path)
    assert (first.path, first.id, second.id) == ("", "text", "text#2")
    assert second.captions == {"video": ("y", "z")}


def test_told_from_our_own_lists(tmp_path):
    (ours,) = _read(tmp_path, {"path": "a.mp4", "caption_": 3, "captions": "x", "topic": "t"})
    assert (ours.labels, ours.captions) == ({"topic": "t"}, {"video": ("x",)})
    assert not annotations.looks_like({"captions": {"video": "x"}, "audio": True, "id": "a"})
    assert annotations.looks_like({"video": "v", "captions": "x"})
    (forced,) = _read(tmp_path, {"captions": "x", "split": "train"}, format="annotations")
    assert forced.split == "train"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"vidoe": "v.mp4", "caption": "x"}, "vidoe: unknown field; did you mean 'video'?"),
        ({"video": "v", "crop_box": [0, 0, 1, 1]}, "crop_box: unknown field; did you mean 'crop_b"),
        ({"video": "v", "video_start_fram": 3}, "unknown field; did you mean 'video_start_frame'"),
        ({"video": 3, "caption": "x"}, "video: must be the path of a file, is 3"),
        ({"video": "v", "image": "i"}, "image: is given beside 'video'"),
        ({"video": "v", "caption": 3}, "caption: must be a text or a list of texts, is 3"),
        ({"video": "v", "avs_captions": {"a": "b"}}, "avs_captions: must be a text or a list"),
        ({"image": "i", "caption": "x", "crop_bbox": [5, 0, 1, 9]}, "crop_bbox: must be [x0, y0"),
        ({"video": "v", "video_start_frame": 3}, "video_fps: must be the frames a second"),
        ({"video": "v", "video_start_frame": -1, "video_fps": 2}, "video_start_frame: must be the"),
        (
            {"video": "v", "video_start_frame": 9, "video_end_frame": 9, "video_fps": 2},
            "video_end_frame: must be later than video_start_frame (9), is 9",
        ),
        ({"video": "v", "option": ["a", "b"], "answer": 2}, "answer: must be places among the 2"),
        ({"video": "v", "option": ["a", "b"], "answer": [1, 2]}, "answer: must be places"),
        ({"video": "v", "option": ["a", "b"]}, "answer: is missing: a place among the 2"),
        ({"video": "v", "answer": 2}, "answer: needs `option`"),
        ({"video": "v", "question": "q"}, "answer: is missing; a question needs one"),
        ({"video": "v", "question": "q", "answer": "a", "question_id": 1.5}, "question_id: must"),
        ({"question_id": 3, "asr": None}, "video: is missing: give video, image or audio"),
        ({"video": "v", "group": 3}, "group: must be a text"),
        (["video"], "must be a JSON object"),
    ],
)
def test_wrong_records(tmp_path, record, words):
    path = _write(tmp_path, [{"video": "good.mp4", "caption": "x"}, record])
    with pytest.raises(DataError) as caught:
        read_clips(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_validate_looks_at_pictures_and_sound_files(tmp_path):
    clips.write_clip(tmp_path / "v.mp4", 8, audio=True)
    multimodal.write_picture(tmp_path / "p.png", 1)
    multimodal.write_wav(tmp_path / "s.wav")
    (tmp_path / "bad.wav").write_bytes(b"RIFF0000")
    records = [
        {"video": "v.mp4", "caption": "x"},
        {"image": "p.png", "caption": "x"},
        {"video": "v.mp4", "audio": "s.wav", "caption": "x"},
        {"video": "v.mp4", "audio": "bad.wav", "caption": "x"},
        {"image": "p.png", "caption": "x", "crop_bbox": [90, 0, 99, 9]},
    ]
    report = validate.check(_write(tmp_path, records))
    assert [p.field for p in report.problems] == ["sound", "path"]
    assert "bad.wav" in report.problems[0].message
    assert "lies outside" in report.problems[1].message
    assert len(report.good) == 3
    assert any("in files apart: 2" in line for line in validate.summary(report))
    sounds = validate.check(_write(tmp_path, [{"audio": "s.wav", "caption": "x"}]))
    assert (sounds.problems, sounds.good[0].seconds) == ([], 0.5)
    assert len(list(validate.summary(sounds))) > 5
    both = validate.check(_write(tmp_path, [records[0], {"audio": "s.wav", "caption": "x"}]))
    assert "put such records into a list of their own" in both.problems[0].message
