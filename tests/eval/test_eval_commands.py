"""`iv2 eval`: arguments of each task, and retrieval and zero-shot of an imported checkpoint."""

from __future__ import annotations

import argparse
import json

import pytest
from PIL import Image

from iv2_jax import cli
from iv2_jax.errors import ConfigError
from iv2_jax.eval import commands
from iv2_jax.interop.load import save_checkpoint
from iv2_jax.models import stage2
from tests.eval import two_towers

VISUAL = stage2.ZOO["test_tiny_stage2"]


def _check(*arguments):
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    commands.check(parser.parse_args(["--ckpt", "x", *arguments]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rerank 4", "--rerank belongs to --task retrieval, not to --task probe"),
        ("--split test", "--split belongs to --task retrieval and zero_shot"),
        ("--task retrieval --label a", "--label belongs to --task probe and zero_shot"),
        ("--task retrieval --no-random", "--no-random belongs to --task probe"),
        ("--task zero_shot", "needs one --label"),
        ("--task retrieval --mix 0.5", "--mix needs --rerank"),
        ("--task retrieval --sheet-rows 3", "--sheet-rows needs --sheet"),
        ("--task retrieval --rerank 0", "--rerank must be at least 1, is 0"),
        ("--task retrieval --format json", "need --data"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ConfigError, match=message):
        _check(*arguments.split())


def test_arguments_that_fit():
    _check("--label", "a", "b", "--no-random")
    _check("--task", "retrieval", "--rerank", "4", "--mix", "0.5", "--sheet", "s.jpg")
    _check("--task", "zero_shot", "--label", "a", "--template", "a {}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    two_towers.write_set(folder)
    save_checkpoint(two_towers.params_of(VISUAL), VISUAL, folder / "model", source="here")
    return folder


def _eval(folder, monkeypatch, *arguments):
    monkeypatch.setenv("IV2_COMPILE_CACHE", "")
    return cli.main(
        [
            "eval",
            *("--ckpt", str(folder / "model"), "--data", str(folder / "clips.jsonl")),
            *("--tokenizer", f"bert:{folder / 'vocab.txt'}", "--max-length", "8"),
            *arguments,
        ]
    )


def test_retrieval(folder, monkeypatch, capsys):
    out, sheet = folder / "out.json", folder / "sheet.jpg"
    arguments = ["--task", "retrieval", "--split", "test", "--rerank", "3", "--random"]
    files = ["--out", str(out), "--sheet", str(sheet), "--sheet-rows", "2"]
    assert _eval(folder, monkeypatch, *arguments, *files) == 0
    printed = capsys.readouterr().out
    assert "6 clips, 7 texts of 8 captions, 0 left out" in printed
    assert all(kind in printed for kind in ("sim", "dsl", "match", "chance"))
    rows = json.loads(out.read_text())["rows"]
    assert [row["trained"] for row in rows] == [True, False]
    assert rows[0]["metrics"]["sim"] != rows[1]["metrics"]["sim"]
    assert rows[0]["metrics"]["chance"] == rows[1]["metrics"]["chance"]
    assert rows[0]["metrics"]["match"]["t2v_r10"] == 100
    with Image.open(sheet) as image:
        assert image.width > 900
        assert 250 < image.height < 450


def test_zero_shot(folder, monkeypatch, capsys):
    assert _eval(folder, monkeypatch, "--task", "zero_shot", "--label", "label") == 0
    assert "2 classes, 6 clips, 0 left out" in capsys.readouterr().out


def test_user_errors_are_told(folder, monkeypatch, capsys):
    arguments = ["eval", "--task", "retrieval", "--ckpt", str(folder / "model")]
    monkeypatch.setenv("IV2_COMPILE_CACHE", "")
    assert cli.main(arguments) == 2
    assert "give --data" in capsys.readouterr().err
    assert cli.main([*arguments, "--data", str(folder / "clips.jsonl")]) == 2
    assert "give --tokenizer KIND:PATH" in capsys.readouterr().err
    save_checkpoint(two_towers.params_of(VISUAL.text), VISUAL.text, folder / "text", source="here")
    arguments[-1] = str(folder / "text")
    assert cli.main(arguments) == 2
    assert "kind 'bert'" in capsys.readouterr().err
