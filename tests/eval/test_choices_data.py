"""Questions from files, the benchmark's frames, statistics of answers, and clips of others."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from iv2_jax.data.decode import DecodeError
from iv2_jax.data.instruct.conversations import Medium
from iv2_jax.data.instruct.sequence import SequenceBuilder, SequenceConfig
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.tiles import TilingConfig
from iv2_jax.errors import ConfigError, DataError
from iv2_jax.eval import answers_stats as stats
from iv2_jax.eval.answers_batches import bucket
from iv2_jax.eval.answers_kept import KeptAnswers
from iv2_jax.eval.answers_pixels import ClipViews, bound_frames
from iv2_jax.eval.answers_prompts import PROMPTS, Question, Writer
from iv2_jax.eval.choices_data import MVBENCH, read_choices
from tests.data import clips
from tests.data.instruct.words import mistral
from tests.eval import tiny_chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.write_benchmark(tmp_path_factory.mktemp("data") / "mvbench")


# -- files -----------------------------------------------------------------------------------------


def test_the_benchmark_s_files(folder):
    found = read_choices(folder / "json", str(folder))
    assert found.is_mvbench
    assert list(found.tasks()) == ["action_sequence", "object_shuffle"]
    first, second, third = found.questions[:3]
    assert first.id == "action_sequence:1"
    assert (first.options, first.answer, first.number) == (
        ("A cat.", "A dog.", "Mud."),
        "A dog.",
        1,
    )
    video = folder / "video" / "star/Charades_v1_480" / "a.mp4"
    assert second.medium == Medium("video", str(video), 1.0, 2.0)
    # Of tasks about whole videos, start and end mean nothing.
    assert (third.medium.start, third.medium.end) == (None, None)
    # The folder may be given without or with `video`, and tasks one by one.
    same = read_choices(folder / "json", str(folder / "video"), tasks=["object_shuffle"])
    assert [q.medium for q in same.questions] == [q.medium for q in found.questions[2:]]
    assert len(MVBENCH) == 20
    assert sum(task.bound for task in MVBENCH.values()) == 5


def test_missing_clips_are_counted_and_named(folder, tmp_path):
    for name in ("action_sequence", "object_shuffle"):
        (tmp_path / f"{name}.json").write_text((folder / "json" / f"{name}.json").read_text())
    videos = tmp_path / "perception" / "videos"
    videos.mkdir(parents=True)
    (videos / "b.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 5 questions are not there \(action_sequence:1: "):
        read_choices(tmp_path)
    found = read_choices(tmp_path, missing="skip")
    assert list(found.missing) == ["action_sequence:1", "action_sequence:2"]
    assert all(path.endswith("star/Charades_v1_480/a.mp4") for path in found.missing.values())
    assert len(found.questions) == 3


def test_plain_lists(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    items = [
        {"video": "a.mp4", "question": "q", "candidates": ["x", "y"], "answer": "y", "task": "t"},
        {"path": "a.mp4", "question": "q", "options": ["x", "y"], "answer": 1, "kind": "k"},
        {"question": "q", "options": ["x", "y"], "answer": "(b)", "id": 7},
        {"video": "a.mp4", "question": "q", "options": ["B", "A"], "answer": "A", "start": 1},
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "q.json").write_text(json.dumps(items))
    found = read_choices(tmp_path / "q.jsonl")
    assert [q.number for q in found.questions] == [1] * 4
    assert [q.task for q in found.questions] == ["t", "k", "q", "q"]
    assert found.questions[2].id == "q:3:7"
    assert found.questions[2].medium is None
    assert found.questions[3].medium == Medium("video", str(tmp_path / "a.mp4"), 1.0, None)
    assert not found.is_mvbench
    again = read_choices(tmp_path / "q.json")
    assert again.questions == found.questions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "z"}, r"q.json:1: record 1: answer: must be one of the options \['x', 'y'\]"),
        ({"answer": 2}, "answer: is 2; the 2 options count from 0 on"),
        ({"answer": True}, "answer: must be one of"),
        ({"candidates": []}, "candidates: must be a list of options"),
        ({"candidates": ["x", 3]}, r"candidates\[1\]"),
        ({"candidates": ["x", " "]}, "an option without text"),
        ({"candidates": [str(i) for i in range(27)], "answer": 0}, "there are 26 letters"),
        ({"question": None}, "question: must be a text"),
        ({"start": 3, "end": 2}, "end: must be later than start"),
        ({"video": 5}, "video: must be the path"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, changes, message):
    item = {"video": "a", "question": "q", "candidates": ["x", "y"], "answer": "x"} | changes
    (tmp_path / "q.json").write_text(json.dumps([item]))
    with pytest.raises(DataError, match=message):
        read_choices(tmp_path / "q.json")


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_choices(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no \.json"):
        read_choices(tmp_path)
    (tmp_path / "q.json").write_text(" ")
    with pytest.raises(DataError, match="is empty"):
        read_choices(tmp_path / "q.json")
    (tmp_path / "q.json").write_text('[{"video": ')
    with pytest.raises(DataError, match="not JSON"):
        read_choices(tmp_path / "q.json")
    with pytest.raises(DataError, match="has no task 'r'; it has q"):
        read_choices(tmp_path, tasks=["r"])


def test_answers_of_another_file_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"video": "a"}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:1: is no answer of ours"):
        KeptAnswers(path, {})
    path.write_text('{"settin')
    with KeptAnswers(path, {"by": "x"}) as kept:
        kept.add(Question("q", "Why?", "so"), {"reason": "gone"})
    with KeptAnswers(path, {"by": "x"}) as kept:
        assert list(kept.found) == ["q"]
        assert kept.known(Question("q", "Why?", "so")) is None  # it may be there now
    with pytest.raises(ConfigError, match="has answers with by='x'"):
        KeptAnswers(path, {"by": "y"})


# -- prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "compat", "ids"),
    [
        ("mistral_v2", "none", [29473, 4, 6238, 4319, 29515, 29500]),  # spec stage3 4.1
        ("mistral_v3", "none", [29473, 4, 6238, 4319, 29515, 29500]),
        ("mistral_v3", "released_chat", [29473, 4, 19880, 4319, 29515, 29500]),
    ],
)
def test_the_answer_prefix_in_a_real_vocabulary(template, compat, ids):
    tokenizer = mistral()
    config = SequenceConfig(template, 2000, tokens_per_view=2, compat=compat)
    builder = SequenceBuilder(config, tokenizer)
    medium = Medium("video", "a.mp4")
    question = Question("q", "Which?", "a dog", ("a dog", "a cat"), medium)

    def scored(writer):
        found = writer.targets(question, 1)
        return [[int(t.sequence.tokens[p]) for p in t.places] for t in found]

    writer = Writer(builder, TalkConfig("mistral"), PROMPTS["mvbench"])
    prompt = writer.prompt_of(question, 1)
    assert prompt.tokens[-6:].tolist() == ids
    assert prompt.views == ((0, 0),)
    assert scored(writer) == [tokenizer.tokenize_plain(x)[-1:] for x in ("(A", "(B")]
    opened = scored(Writer(builder, TalkConfig("mistral"), PROMPTS["open"]))
    assert opened[0][0] == opened[1][0] == 1032  # the word "a"
    assert [row[-1] for row in opened] == [2, 2]


# -- frames ----------------------------------------------------------------------------------------


def test_the_benchmark_s_frames():
    # Check values of spec stage3 11.1.
    expected = [63, 70, 76, 83, 89, 96, 102, 109, 115, 122, 129, 135, 142, 148, 155, 161]
    assert bound_frames(300, 16, 30, 2.0, 5.5).tolist() == expected
    assert bound_frames(300, 2, 30).tolist() == [74, 224]
    # Folders count from 1: numbers 1 to 9 of nine pictures at 3 a second.
    assert bound_frames(9, 4, 3, first=1).tolist() == [1, 3, 5, 7]
    assert bound_frames(9, 4, 3, 1.0, 3.0, first=1).tolist() == [2, 4, 5, 6]
    assert bound_frames(9, 2, 3, 50.0, 60.0).tolist() == [8, 8]
    assert bound_frames(1, 3, 0.0).tolist() == [0, 0, 0]


def test_views_of_videos_folders_and_tiles(folder, tmp_path):
    star = folder / "video" / "star/Charades_v1_480" / "a.mp4"  # 30 frames, 10 a second
    talk = tiny_chat.talk(frames=2)
    medium = Medium("video", str(star), 1.0, 2.0)
    shown = ClipViews(talk, protocol="mvbench").load(medium)
    assert shown.shape == (1, 2, 28, 28, 3)
    assert shown.dtype == np.uint8
    frames = tmp_path / "frames"
    frames.mkdir()
    from PIL import Image

    for number in range(1, 10):
        Image.fromarray(clips.picture(number, 28, 28)).save(frames / f"{number:05d}.png")
    for protocol, expected in (("mvbench", [4, 7]), ("run", [5, 7])):
        views = ClipViews(talk, protocol=protocol)
        seen = views.load(Medium("video", str(frames), 1.0, 3.0))
        assert clips.numbers(seen[0]) == expected
        assert views.load(Medium("video", str(frames), 1.0, 3.0)) is seen
    with pytest.raises(DecodeError, match="9 frames at 3 a second, none from 4"):
        ClipViews(talk).load(Medium("video", str(frames), 4.0, 5.0))
    tiled = ClipViews(tiny_chat.talk(tiling=TilingConfig(28, fixed_grid=(2, 1))))
    assert tiled.load(medium).shape == (3, 2, 28, 28, 3)
    picture = ClipViews(talk).load(Medium("image", str(frames / "00003.png")))
    assert clips.numbers(picture[0]) == [3]
    with pytest.raises(ConfigError, match="did you mean 'mvbench'"):
        ClipViews(talk, protocol="mvbnch")


def test_few_lengths_are_compiled():
    lengths = {bucket(n) for n in range(1, 2049)}
    assert lengths == {64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048}
    assert all(n <= bucket(n) <= max(64, n * 3 / 2) for n in range(1, 3000))


# -- statistics ------------------------------------------------------------------------------------


def test_paired_against_a_plain_computation():
    rng = np.random.default_rng(3)
    own, other = rng.normal(0.3, 1, 40), rng.normal(0, 1, 40)
    found = stats.paired(own, other, draws=4000)
    d = own - other
    means = [rng.choice(d, len(d)).mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.difference == pytest.approx(d.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06)
    flips = [abs((d * rng.choice([-1, 1], len(d))).mean()) >= abs(d.mean()) for _ in range(4000)]
    assert found.p == pytest.approx(np.mean(flips), abs=0.03)
    assert (found.better, found.worse) == ((d > 0).sum(), (d < 0).sum())
    assert stats.paired(own, other, draws=4000) == found
    assert stats.paired(other, own, draws=4000).difference == -found.difference


def test_paired_against_scipy():
    scipy_stats = pytest.importorskip("scipy.stats", reason="needs SciPy")
    d = np.array([1.0, 1.0, 0.0, 1.0, -1.0, 1.0, 1.0, 0.0, 1.0])
    test = scipy_stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=512)
    assert stats.paired(d, np.zeros(9)).p == pytest.approx(test.pvalue)


def test_paired_by_groups_is_less_sure():
    # Eight questions on each of ten clips, which are all right or all wrong together.
    clip = np.repeat(np.arange(10), 8)
    own = (clip < 7).astype(float)
    alone, grouped = (stats.paired(own, 1 - own, groups=g) for g in (None, clip.tolist()))
    assert alone.p < 0.001 < grouped.p
    assert grouped.p == pytest.approx(2 * sum(math.comb(10, k) for k in range(4)) / 2**10)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    assert (grouped.questions, grouped.groups) == (80, 10)
    assert stats.paired([1, 0], [1, 0]).p == 1
    assert stats.paired(np.ones(40), np.zeros(40), draws=999).p == 1 / 1000


def test_paired_refuses():
    with pytest.raises(DataError, match="no question"):
        stats.paired([], [])
    with pytest.raises(DataError, match=r"other\[1\] is nan"):
        stats.paired([1, 2], [1, math.nan])
    with pytest.raises(DataError, match="one value of each"):
        stats.paired([1, 2], [1])


def test_intervals():
    # Wilson's, from its formula's textbook values.
    assert stats.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert stats.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert stats.wilson(10, 10)[1] == 1
    assert stats.wilson(0, 0) == (0, 1)
    tasks = [np.r_[np.ones(50), np.zeros(50)], np.ones(100)]
    low, high = stats.mean_interval(tasks)
    assert (low, high) == pytest.approx((0.75 - 0.049, 0.75 + 0.049), abs=0.01)


def test_every_question_gets_a_clip_that_does_not_belong():
    def ask(clip, text, answer):
        return Question(f"{clip} {text}", text, answer, medium=Medium("video", clip))

    answers = {"a": "red", "b": "blue", "c": "red", "d": "green"}
    questions = [ask(clip, "Which colour?", answer) for clip, answer in answers.items()]
    questions += [ask("a", "How many?", "two"), ask("b", "How many?", "Two.")]
    for seed in range(20):
        found = stats.swapped(questions, np.random.default_rng(seed))
        for own, other in zip(questions, found, strict=True):
            assert other.medium != own.medium
            assert (other.id, other.answer) == (own.id, own.answer)
        assert all(answers[q.medium.path] != q.answer for q in found[:4])
        # Both clips about which it is asked have this answer: others are shown.
        assert all(q.medium.path in "cd" for q in found[4:])
    assert found == stats.swapped(questions, np.random.default_rng(19))
    with pytest.raises(DataError, match="about one clip"):
        stats.swapped(questions[:1] * 2, np.random.default_rng(0))
    with pytest.raises(DataError, match="question 1 has no clip"):
        stats.swapped([questions[0], Question("q", "Why?", "so")], np.random.default_rng(0))
