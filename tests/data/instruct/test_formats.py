"""Conversation files: the three formats, both ways, and what is refused with which words."""

from __future__ import annotations

import argparse
import json

import pytest

from iv2_jax.data import commands, manifest
from iv2_jax.data.instruct import formats
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn
from iv2_jax.errors import ConfigError, DataError

VIDEOCHAT = [
    {"video": "v/a.mp4", "QA": [{"i": "Look.", "q": "Who?", "a": "A man."}]},
    {
        "video": "b.mp4",
        "start": 1.5,
        "end": 4.0,
        "QA": [{"i": "x", "q": "", "a": "b 😀"}, {"i": "y", "q": "r\u2028s", "a": "</s>"}],
    },
    {"image": "c.jpg", "QA": [{"i": "", "q": "What?", "a": "A cat."}]},
    {"QA": [{"i": "", "q": "2 + 2?", "a": "4"}]},
]
LLAVA = [
    {
        "id": "7",
        "image": "c.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {
        "id": "8",
        "image": ["a.jpg", "b.jpg", "c.jpg"],
        "video": "v.mp4",
        "start": 2.0,
        "end": 3.0,
        "conversations": [
            {"from": "system", "value": "Compare."},
            {"from": "human", "value": "<video>\n<image>\nAs in <image>?"},
            {"from": "gpt", "value": "Yes."},
            {"from": "system", "value": ""},
            {"from": "human", "value": "And <image>"},
            {"from": "gpt", "value": "No."},
        ],
    },
]


def _write(path, value):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


def _read(path, value, **options):
    return formats.read(_write(path, value), **{"missing": "ignore"} | options)


def _run(*words):
    parser = argparse.ArgumentParser(prog="iv2 data")
    commands.add_arguments(parser)
    return commands.run(parser.parse_args(["convert-dialogues", *map(str, words)]))


def test_videochat(tmp_path):
    found = _read(tmp_path / "a.json", VIDEOCHAT, root="/data")
    assert [c.kind for c in found] == ["video", "video", "image", "text"]
    assert found[0].media == (Medium("video", "/data/v/a.mp4"),)
    assert found[1].media == (Medium("video", "/data/b.mp4", 1.5, 4.0),)
    assert found[1].turns[1] == Turn("r\u2028s", "</s>", "y")
    assert not found[1].ordered
    assert found[3].id == "a.json:1"
    clip = found[1].media[0].clip()
    assert (clip.path, clip.start, clip.end) == ("/data/b.mp4", 1.5, 4.0)
    assert formats.kinds(found) == {"video": 2, "image": 1, "text": 1}


def test_llava(tmp_path):
    cat, three = _read(tmp_path / "a.json", LLAVA, root="s3://data/")
    assert cat.ordered
    assert cat.media == (Medium("image", "s3://data/c.jpg"),)
    assert cat.turns == (Turn("What is it?", "A cat."), Turn("Sure?", "Yes."))
    assert three.front == (0, 1)
    assert three.media[0] == Medium("video", "s3://data/v.mp4", 2.0, 3.0)
    assert [m.path[-5:] for m in three.media[1:]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert three.turns == (
        Turn("As in ?", "Yes.", "Compare.", ((6, 2),)),
        Turn("And ", "No.", "", ((4, 3),)),
    )


@pytest.mark.parametrize("value", ["<image>\nWhy?", "Why?\n<image>", "Why?", "<video> Why?"])
def test_one_video_stands_in_front(tmp_path, value):
    """Wherever LLaVA's files put it, and by either name."""
    record = {"video": "a.mp4", "conversations": [{"from": "human", "value": value}]}
    record["conversations"].append({"from": "gpt", "value": "So."})
    (found,) = _read(tmp_path / "a.json", [record])
    assert found.turns == (Turn("Why?", "So."),)
    assert found.front == (0,)


def test_keys_of_other_programs_are_left_alone(tmp_path):
    talk = [{"from": "human", "value": "q", "markdown": None}, {"from": "gpt", "value": "a"}]
    (found,) = _read(tmp_path / "a.json", [{"id": 3, "source": "x", "conversations": talk}])
    assert (found.id, found.turns) == ("3", (Turn("q", "a"),))
    entry = {"i": "x", "q": "q", "a": "a", "question_id": 7}
    (found,) = _read(tmp_path / "b.json", [{"QA": [entry], "dataset": "x"}])
    assert found.turns == (Turn("q", "a", "x"),)


def test_ours_reads_manifests(tmp_path):
    lines = [
        {"path": "a.JPG", "qa": [["q", "a"]], "captions": {"video": ["x"]}},
        {"file": "a.mp4", "start": 1, "qa": [{"question": "q", "answer": "a"}], "topic": "t"},
        {"qa": [["q", "a"]], "instruction": "Look.", "ordered": True},
    ]
    found = _read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert [c.kind for c in found] == ["image", "video", "text"]
    assert found[1].media[0].start == 1
    assert found[2].turns == (Turn("q", "a", "Look."),)
    assert found[2].ordered


@pytest.mark.parametrize("start", ["videochat", "llava"])
def test_every_format_goes_into_every_other_and_back(tmp_path, start, capsys):
    source = {"videochat": VIDEOCHAT, "llava": LLAVA}[start]
    _write(tmp_path / "0.json", source)
    way = {"videochat": ["llava", "ours", "videochat"], "llava": ["ours", "llava"]}[start]
    for at, name in enumerate(way):
        assert _run(tmp_path / f"{at}.json", tmp_path / f"{at + 1}.json", "--to", name) == 0
    assert json.loads((tmp_path / f"{len(way)}.json").read_text("utf-8")) == source
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(way)
    if start == "videochat":
        assert "4 conversations (2 video, 1 image, 1 text) as llava" in out[0]


def test_ours_says_everything():
    talk = Conversation(
        (Turn("ab", "c", "i", ((0, 2), (1, 0))), Turn("d", "e", "j"), Turn("f", "g", "i")),
        (Medium("image", "x"), Medium("video", "y", None, 2.0), Medium("video", "z")),
        ordered=True,
        id="n",
    )
    assert formats.from_record(formats.to_record(talk, "ours"), "ours") == talk


@pytest.mark.parametrize(
    ("talk", "format", "words"),
    [
        (Conversation((Turn("q", "a"),), (Medium("image", "x"),) * 2), "videochat", "one medium"),
        (Conversation((Turn("q", "a"),), (Medium("video", "x", 1.0),)), "videochat", "end"),
        (Conversation((Turn("<image>", "a"),)), "llava", "has <image>, in llava a place"),
        (
            Conversation((Turn("ab", "a", media=((2, 0),)),), (Medium("image", "x"),)),
            "llava",
            "would put them in front",
        ),
        (Conversation((Turn("q", " "),)), "ours", "is empty"),
        (Conversation((Turn("q", None),)), "ours", "is empty"),
    ],
)
def test_what_a_format_cannot_say_is_refused(tmp_path, talk, format, words):
    with pytest.raises(DataError, match=rf"x.json: record 1 .*{words}"):
        formats.write(tmp_path / "x.json", [talk], format=format)
    assert not list(tmp_path.iterdir())


_TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"video": "a", "Qa": []}, "Qa: unknown field; did you mean 'QA'"),
        ({"vdeo": "a", "QA": [{"a": "x"}]}, "vdeo: unknown field; did you mean 'video'"),
        ({"video": "a", "QA": []}, "QA: must be a list of questions and answers, at least one"),
        ({"video": "a", "QA": [{"i": "", "q": "x"}]}, r"QA\[0\]\.a: is missing"),
        ({"QA": [{"question": "x", "a": "b"}]}, r"QA\[0\]\.question: .*did you mean 'q'"),
        ({"QA": [{"q": "x", "a": "b"}, {"q": "x", "a": " \n"}]}, r"QA\[1\]\.a: is empty"),
        ({"QA": [{"q": 3, "a": "b"}]}, r"QA\[0\]\.q: must be a text, is 3"),
        ({"video": "a", "image": "b", "QA": [{"a": "b"}]}, "image: is given beside 'video'"),
        ({"video": "", "QA": [{"a": "b"}]}, "video: must be the path of a file"),
        ({"video": "a", "start": 2, "QA": [{"a": "b"}]}, "end: is missing: a clip has both"),
        ({"video": "a", "start": 2, "end": 1, "QA": [{"a": "b"}]}, "end: must be later than"),
        ({"video": "a", "start": "2", "end": 3, "QA": [{"a": "b"}]}, "start: must be a number"),
        ({"start": 2, "end": 3, "QA": [{"a": "b"}]}, "start: is given without a video"),
        ({"conversation": _TALK}, "conversation: .*did you mean 'conversations'"),
        ({"conversations": _TALK[:1]}, r"conversations\[0\]: the last question has no answer"),
        ({"conversations": _TALK + _TALK[:1]}, r"conversations\[2\]: the last question has no"),
        ({"conversations": _TALK[1:]}, r"conversations\[0\]\.from: must be 'human'"),
        ({"conversations": [_TALK[0], _TALK[0]]}, r"conversations\[1\]\.from: must be 'gpt'"),
        ({"conversations": [{"from": "GPT", "value": "a"}]}, r"\.from: .*did you mean 'gpt'"),
        (
            {"conversations": [{"from": "gpt", "text": "a"}]},
            r"\[0\]\.value: is missing; there are from, text",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, _TALK[1]]},
            r"conversations\[0\]\.value: has more <image>",
        ),
        (
            {
                "image": ["a", "b"],
                "conversations": [{"from": "human", "value": "<image>"}, _TALK[1]],
            },
            "names 1 of 2 files",
        ),
        ({"video": ["a", "b"], "start": [1], "conversations": _TALK}, "start: has 1 entries for 2"),
        ({"conversations": [{"From": "gpt", "value": "a"}]}, r"\[0\]\.From: .*mean 'from'"),
        ({"qa": [["q"]]}, r"qa\[0\]: must be \[question, answer\]"),
        ({"qa": [{"question": "q"}]}, r"qa\[0\]\.answer: is missing"),
        ({"qa": [["q", ""]]}, r"qa\[0\]\.answer: is empty"),
        ({"path": "a", "media": [{"video": "b"}], "qa": [["q", "a"]]}, "path: is given beside"),
        ({"media": [{"start": 1}], "qa": [["q", "a"]]}, r"media\[0\]: names no file"),
        ({"media": [{"video": "b", "end": 0}], "qa": [["q", "a"]]}, r"media\[0\]\.end: must be"),
        ({"qa": [{"question": "q", "answer": "a", "media": [[0, 0]]}]}, "names medium 0; there"),
        (
            {
                "media": [{"image": "x"}, {"image": "y"}],
                "qa": [{"question": "q", "answer": "a", "media": [[1, 0], [0, 1]]}],
            },
            r"qa\[0\]\.media: must be sorted by place",
        ),
        (
            {
                "media": [{"image": "x"}],
                "qa": [{"question": "q", "answer": "a", "media": [[0, 0], [1, 0]]}],
            },
            "qa: a medium stands in two places",
        ),
        (
            {
                "media": [{"image": "x"}],
                "qa": [{"question": "q", "answer": "a", "media": [[2, 0]]}],
            },
            "place 2 is outside the question of 1 letters",
        ),
        ({"qa": [["q", "a"]], "ordered": 1}, "ordered: must be true or false"),
    ],
)
def test_mistakes_name_file_record_and_field(tmp_path, record, words):
    good = {"QA": [{"a": "b"}]} if "QA" in record or "Qa" in record else None
    good = good or ({"qa": [["q", "a"]]} if "qa" in record else {"conversations": _TALK})
    path = _write(tmp_path / "a.json", f"[{json.dumps(good)},\n{json.dumps(record)}]")
    with pytest.raises(DataError, match=rf"a\.json:2: record 2: .*{words}"):
        formats.read(path, missing="ignore")
    problems = []
    assert len(formats.read(path, missing="ignore", problems=problems)) == 1
    assert [(p.record, p.line) for p in problems] == [(2, 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("[]", "no conversation can be used"),
        ('[{"video": "a"}]', "record 1: has neither QA"),
        ('[{"QA": [{"a": "b"}]},', "record 2: not JSON"),
        ("[3]", "the format cannot be told: 3"),
        ('{"qa": [["q", "a"]]}\n{"qa": [["q", "a"]}', "a.json:2: record 2: not JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, words):
    with pytest.raises(DataError, match=words):
        _read(tmp_path / "a.json", text)


def test_missing_files_are_named_and_counted(tmp_path, capsys):
    (tmp_path / "b.mp4").touch()
    path = _write(tmp_path / "a.json", VIDEOCHAT)
    with pytest.raises(DataError, match=r"record 1: video: .*a.mp4 does not exist \(2 of 3 files"):
        formats.read(path)
    assert len(formats.read(path, missing="skip")) == 2
    assert "2 conversations left out: their files are missing" in capsys.readouterr().err
    problems = []
    assert len(formats.read(path, problems=problems)) == 2
    assert [p.field for p in problems] == ["video", "image"]
    assert len(formats.read(path, root="http://x", missing="error")) == 4  # not looked for
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        formats.read(path, missing="skipp")
    with pytest.raises(DataError, match="cannot be read"):
        formats.read(tmp_path / "none.json")


def test_paths_start_from_the_folder_or_its_parent(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "c.jpg").touch()
    path = _write(tmp_path / "lists" / "a.json", LLAVA[:1])
    (found,) = formats.read(path)
    assert found.media[0].path == str(tmp_path / "c.jpg")


def test_long_turns_emoji_and_half_pairs(tmp_path):
    odd = ["word " * 10_000, "👩‍👩‍👧 日本", "half \ud83d", "nul \x00 \u2028 \x85"]
    talks = [Conversation((Turn(text, text),), id=str(i)) for i, text in enumerate(odd)]
    for name in formats.FORMATS:
        formats.write(tmp_path / "a", talks, format=name)
        assert [c.turns for c in formats.read(tmp_path / "a", format=name)] == [
            c.turns for c in talks
        ]


def test_manifests_hold_such_texts_too(tmp_path):
    record = {"path": "a.mp4", "qa": [["a\u2028b", "c\x85"]]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\r\n\r\n", encoding="utf-8")
    assert manifest.read_clips(path)[0].qa == (("a\u2028b", "c\x85"),)
    assert formats.read(path, missing="ignore")[0].turns == (Turn("a\u2028b", "c\x85"),)


def test_converter_mistakes(tmp_path, capsys):
    path = _write(tmp_path / "a.json", LLAVA)
    with pytest.raises(ConfigError, match="did you mean 'videochat'"):
        _run(path, tmp_path / "b.json", "--to", "video_chat")
    with pytest.raises(ConfigError, match="is there already; --overwrite"):
        _run(path, path, "--to", "ours")
    with pytest.raises(DataError, match=r"a.json:1: record 2: media: videochat holds one medium"):
        _run(path, tmp_path / "b.json", "--to", "videochat")
    assert _run(path, tmp_path / "b.json", "--to", "videochat", "--skip-bad") == 0
    captured = capsys.readouterr()
    assert "1 conversations (1 image) as videochat; 1 left out" in captured.out
    assert "record 2: media" in captured.err
    with pytest.raises(ConfigError, match="format 'lava' is not known; did you mean 'llava'"):
        _run(path, tmp_path / "c.json", "--to", "ours", "--format", "lava")
