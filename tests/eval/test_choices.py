"""`iv2 eval --task choices` and `--task answers` on a tiny chat model, and their parts."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from iv2_jax import cli
from iv2_jax.data import dialogue
from iv2_jax.data.instruct.conversations import Medium
from iv2_jax.data.instruct.sequence import SequenceBuilder
from iv2_jax.errors import ConfigError
from iv2_jax.eval import answers, answers_kept, answers_open, choices, commands
from iv2_jax.eval.answer_parser import parse_choice
from iv2_jax.eval.answers_pixels import ClipViews
from iv2_jax.eval.answers_prompts import PROMPTS, Question, Writer, stop_ids
from iv2_jax.eval.chat_runs import open_chat, with_views
from iv2_jax.eval.choices_data import read_choices
from iv2_jax.models.chat import Chat
from iv2_jax.models.decoding import GenerationConfig
from iv2_jax.parallel.mesh import MeshConfig, make_mesh
from tests.eval import tiny_chat

OPTIONS = choices.ChoiceOptions(prompt="options", max_new_tokens=4, batch_size=2, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_chat.write_benchmark(tmp_path_factory.mktemp("bench") / "mvbench")
    tiny_chat.checkpoint(folder.parent / "run", tiny_chat.talk())
    return folder.parent


@pytest.fixture(scope="module")
def questions(folder):
    return read_choices(folder / "mvbench" / "json", str(folder / "mvbench")).questions


@pytest.fixture(scope="module")
def chat():
    return tiny_chat.chat_model(tiny_chat.talk())


def _prepare(monkeypatch):
    """One device, whose programs the tests share; the tokenizer of letters."""
    monkeypatch.setenv("IV2_COMPILE_CACHE", "")
    monkeypatch.setattr(commands, "_all_devices", lambda: None)
    tiny_chat.use_chars(monkeypatch)


def _eval(folder, monkeypatch, *arguments):
    _prepare(monkeypatch)
    data = ["--data", str(folder / "mvbench" / "json"), "--videos", str(folder / "mvbench")]
    small = ["--batch-size", "2", "--max-new-tokens", "4", "--prompt", "options"]
    run = ["eval", "--task", "choices", "--ckpt", str(folder / "run")]
    return cli.main([*run, *data, *small, *arguments])


def test_the_benchmark_by_generation(folder, monkeypatch, capsys):
    out = folder / "out.json"
    files = ["--answers", str(folder / "answers"), "--out", str(out), "--swap"]
    assert _eval(folder, monkeypatch, *files) == 0
    printed = capsys.readouterr().out
    assert all(f"  {task} " in printed for task in ("action_sequence", "object_shuffle", "all"))
    assert "own clip against another, accuracy" in printed
    row = json.loads(out.read_text())["rows"][0]
    assert row["all"]["questions"] == 5
    assert row["tasks"]["object_shuffle"]["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert row["options"]["protocol"] == "mvbench"
    assert row["own_against_swapped"]["accuracy"]["questions"] == 5
    kept, other = sorted((folder / "answers").iterdir(), key=lambda f: "swapped" in f.name)
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert lines[0]["settings"]["by"] == "generate"
    records = {record["id"]: record for record in lines[1:]}
    assert len(records) == 5
    right = sum(
        (n := parse_choice(r["reply"], r["options"])) is not None and r["options"][n] == r["answer"]
        for r in records.values()
    )
    assert row["all"]["right"] == right
    swapped = [json.loads(line) for line in other.read_text().splitlines()[1:]]
    assert all(records[r["id"]]["clip"] != r["clip"] for r in swapped)
    # Once more: nothing is asked again, so nothing is compiled or added.
    before = kept.read_bytes()
    monkeypatch.setattr(choices, "Asker", None)
    assert _eval(folder, monkeypatch, *files) == 0
    assert kept.read_bytes() == before


def test_a_killed_run_goes_on(folder, questions, chat, monkeypatch):
    whole = choices.evaluate_choices(chat, questions, OPTIONS)
    path, add = folder / "killed.jsonl", answers_kept.KeptAnswers.add

    def killed(self, question, values):
        if len(self.found) == 3:
            self._file.write('{"id": "object_sh')
            raise KeyboardInterrupt
        add(self, question, values)

    with monkeypatch.context() as patch:
        patch.setattr(answers_kept.KeptAnswers, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            choices.evaluate_choices(chat, questions, OPTIONS, answers=path)
    asked, answer = [], answers.Asker.answer
    monkeypatch.setattr(
        answers.Asker,
        "answer",
        lambda self, qs, config: asked.append(qs) or answer(self, qs, config),
    )
    again = choices.evaluate_choices(chat, questions, OPTIONS, answers=path)
    assert again.records == whole.records
    assert [len(some) for some in asked] == [2]
    other = dataclasses.replace(OPTIONS, max_new_tokens=5)
    with pytest.raises(ConfigError, match="has answers with max_new_tokens=4, now it is 5"):
        choices.evaluate_choices(chat, questions, other, answers=path)
    # A question that was worded anew is asked anew.
    reworded = [dataclasses.replace(questions[0], text="What was it?"), *questions[1:]]
    choices.evaluate_choices(chat, reworded, OPTIONS, answers=path)
    assert [len(some) for some in asked] == [2, 1]


def _writer(chat, prompt):
    """Writes prompts of any length."""
    config = dataclasses.replace(chat.talk.sequence, max_length=2000)
    return Writer(SequenceBuilder(config, chat.builder.tokenizer), chat.talk, prompt)


def _direct(chat, question, prompt):
    """Log-probability of each option from the logits of its whole sequence."""
    views = ClipViews(chat.talk).load(question.medium)
    video = np.repeat(chat.config.encoder.normalize(views)[None], len(question.options), axis=0)
    targets = _writer(chat, prompt).targets(question, len(views))
    rows = dialogue.pad_batch([target.sequence for target in targets], 64, 0)
    inputs = (rows["tokens"], rows["visual_index"], rows["mask"])
    apply = jax.jit(Chat(chat.config).apply)
    logits = np.asarray(apply({"params": chat.params}, *inputs, video=video).logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return [
        sum(log_probs[row, at - 1, rows["tokens"][row, at]] for at in target.places)
        for row, target in enumerate(targets)
    ]


def test_likelihoods_are_those_of_the_whole_logits(chat, questions):
    given = {"builder": chat.builder, "batch_size": 2, "threads": 1}
    asked = questions[1:4]
    scores = answers.score_choices(chat.model, chat.params, chat.talk, asked, **given)
    expected = _direct(chat, asked[1], PROMPTS["open"])
    np.testing.assert_allclose(scores[1].log_probs, expected, atol=2e-4)
    assert scores[1].chosen() == int(np.argmax(expected))
    assert scores[1].right() == (asked[1].options[scores[1].chosen()] == "Mud.")
    assert scores[1].answer_log_prob == scores[1].log_probs[2]
    assert scores[1].tokens.tolist() == [len(o) + 1 for o in asked[1].options]
    assert len(scores[2].log_probs) == 2
    by_length = np.array(expected) / scores[1].tokens
    assert scores[1].chosen(by_length=True) == int(np.argmax(by_length))


@pytest.mark.slow
def test_eight_devices_give_what_one_does(chat, questions):
    given = {"builder": chat.builder, "batch_size": 3}
    asked = (chat.model, chat.params, chat.talk, questions)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    one, eight = (answers.score_choices(*asked, mesh=m, **given) for m in (None, mesh))
    for a, b in zip(one, eight, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-4)
    config = GenerationConfig(max_new_tokens=4)
    one, eight = (
        answers.answer_questions(*asked, mesh=m, generation=config, **given) for m in (None, mesh)
    )
    assert one == eight


def test_what_is_scored(chat):
    question = Question("q", "Which?", "an owl", ("an ox", "an owl"))
    tokenizer = chat.builder.tokenizer

    def scored(prompt):
        found = _writer(chat, prompt).targets(question, 0)
        return [[int(t.sequence.tokens[p]) for p in t.places] for t in found]

    spoken = [[*tokenizer.tokenize(text), 2] for text in question.options]
    assert scored(PROMPTS["open"]) == spoken
    assert scored(PROMPTS["mvbench"]) == [tokenizer.tokenize("A"), tokenizer.tokenize("B")]
    prefixed = dataclasses.replace(PROMPTS["open"], answer_prefix="It is ")
    assert scored(prefixed) == spoken
    assert stop_ids(chat.builder) == (2,)


def test_prompts_are_the_benchmarks(chat):
    medium = Medium("video", "a.mp4")
    question = Question("q", "what is it?", "b", ("a", "b"), medium, instruction="Look.")
    spoken = {}
    for name, prompt in PROMPTS.items():
        sequence = _writer(chat, prompt).prompt_of(question, 1)
        ids = sequence.tokens[sequence.visual_index < 0].tolist()
        spoken[name] = "".join(
            tiny_chat.Chars.MARKS[i] if i < 10 else chat.builder.tokenizer.decode([i]) for i in ids
        )
    system = PROMPTS["mvbench"].instruction
    assert system.startswith("Carefully watch the video and pay attention to the cause and seq")
    assert system.endswith("best option that accurately addresses the question.\n")
    asked = "Question: what is it?\nOptions:\n(A) a\n(B) b\nOnly give the best option."
    seen = "[INST] <Video></Video>[/INST] [INST] "
    said = " [/INST]Best option:("
    assert spoken["mvbench"] == f"<s>{system}{seen}{system}{asked}{said}"
    assert spoken["egoschema"] == f"<s>{system}{seen}{asked.replace('what', 'What')}{said}"
    assert spoken["options"] == f"<s>Look.{seen}{asked}{said}"
    assert spoken["open"] == f"<s>Look.{seen}what is it? [/INST]"


def test_replies_do_not_depend_on_their_batch_and_bad_clips_are_named(chat, questions, folder):
    (folder / "bad.mp4").write_bytes(b"no video")
    bad = dataclasses.replace(
        questions[0], id="bad", medium=Medium("video", str(folder / "bad.mp4"))
    )
    long = dataclasses.replace(questions[0], id="long", text="why " * 150)
    config = GenerationConfig(max_new_tokens=4, do_sample=True)
    given = {"builder": chat.builder, "threads": 1, "generation": config}
    asked = [questions[2], bad, questions[4], long]
    three = answers.answer_questions(
        chat.model, chat.params, chat.talk, asked, batch_size=2, **given
    )
    one = answers.answer_questions(
        chat.model, chat.params, chat.talk, asked[:1], batch_size=2, **given
    )
    assert three[0] == one[0]
    assert three[0].tokens == 4 or three[0].ended
    assert "bad.mp4" in three[1].reason
    assert "max_length=596" in three[3].reason
    result = choices.evaluate_choices(chat, [questions[2], bad], OPTIONS)
    assert list(result.unread()) == ["bad"]
    assert (result.all().questions, result.all().left_out) == (1, 1)


def test_open_questions(folder, monkeypatch, capsys):
    video = str(folder / "mvbench" / "video" / "perception" / "videos" / "b.mp4")
    items = [
        {"video": video, "QA": [{"q": "What?", "a": "Mud"}, {"q": "Where?", "a": "Here."}]},
        {"QA": [{"q": "Who?", "a": "me"}]},
    ]
    (folder / "it.json").write_text(json.dumps(items))
    _prepare(monkeypatch)
    run = ["eval", "--task", "answers", "--ckpt", str(folder / "run"), "--data"]
    small = ["--batch-size", "2", "--max-new-tokens", "4", "--out", str(folder / "open.json")]
    kept = ["--answers", str(folder / "open")]
    assert cli.main([*run, str(folder / "it.json"), *small, *kept]) == 0
    assert "3 questions, 0 left out; exact" in capsys.readouterr().out
    row = json.loads((folder / "open.json").read_text())["rows"][0]
    assert [record["question"] for record in row["answers"]] == ["What?", "Where?", "Who?"]
    assert row["exact"]["share"] == np.mean([r["exact"] for r in row["answers"]])
    assert len(next((folder / "open").iterdir()).read_text().splitlines()) == 4
    assert answers_open.matches("It is the Red ball!", "a red  ball.") == {
        "exact": False,
        "contains": True,
    }
    assert answers_open.matches("The red ball", "red ball")["exact"]
    assert not any(answers_open.matches("redder", "red").values())
    assert not any(answers_open.matches("", "...").values())


def test_opening(folder, monkeypatch):
    tiny_chat.use_chars(monkeypatch)
    chat = open_chat(folder / "run")
    assert chat.talk == tiny_chat.talk()
    assert open_chat(folder / "run", template="phi3").builder.config.template == "phi3"
    wider = with_views(chat, frames=4, tiles=2)
    assert wider.params["encoder"]["pos_embed"].shape[1] == 1 + 4 * 4
    assert (wider.talk.frames, wider.talk.tiling.max_tiles) == (4, 2)
    assert with_views(wider, tiles=0).talk.tiling is None
    tiny_chat.checkpoint(folder / "imported", None)
    with pytest.raises(ConfigError, match="give --tokenizer and --template"):
        open_chat(folder / "imported")
    imported = open_chat(folder / "imported", tokenizer="chars", template="mistral_v3")
    assert imported.talk.frames == tiny_chat.CONFIG.encoder.num_frames
    assert imported.builder.config.tokens_per_view == tiny_chat.CONFIG.bridge.num_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "guess"}, "by='guess'"),
        ({"parser": "released", "by": "likelihood"}, "needs by='generate'"),
        ({"parser": "released", "prompt": "open"}, "prompt 'open' has none"),
        ({"by_length": True}, "needs by='likelihood'"),
        ({"prompt": "mvbnch"}, "did you mean 'mvbench'"),
    ],
)
def test_options_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        choices.ChoiceOptions(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--task probe --videos v", "--videos belongs to --task choices and answers, not to"),
        ("--task answers --swap", "--swap belongs to --task choices, not to --task answers"),
        ("--task choices --random", "--random belongs to --task retrieval and zero_shot"),
        ("--task choices --format ours", "--format belongs to"),
        ("--task choices --max-new-tokens 0", "--max-new-tokens must be at least 1, is 0"),
        ("--task choices", "--task choices needs --data"),
        ("--task answers", "--task answers needs --data"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, monkeypatch, capsys):
    _prepare(monkeypatch)
    assert cli.main(["eval", "--ckpt", "x", *arguments.split()]) == 2
    assert message in capsys.readouterr().err
