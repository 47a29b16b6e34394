"""`iv2 zoo`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from iv2_jax import cli
from iv2_jax.interop import zoo_command
from iv2_jax.models import zoo


def test_every_model_has_its_line():
    lines = zoo_command.table().splitlines()
    rows = {line.split()[0]: line for line in lines if line.startswith("  ")}
    names = [name for name in zoo.names() if not name.startswith("test_")]
    assert set(names) <= set(rows)
    assert "5,941,735,168" in rows["internvideo2_6b"]
    assert "video 1x8x224x224x3" in rows["internvideo2_6b"]
    assert "6,453,900,079" in rows["internvideo2_stage2_6b"]
    assert not any(name.startswith("test_") for name in rows)
    assert "test_tiny" in zoo_command.table(tests=True)


@pytest.mark.parametrize("name", ["test_tiny_stage2", "test_tiny_chat", "test_tiny_shots"])
def test_counts_of_the_table_are_those_of_the_networks(name):
    line = next(x for x in zoo_command.table(tests=True).splitlines() if f" {name} " in x)
    assert f"{zoo.count_params(zoo.get(name)):,}" in line


def test_one_kind_and_one_model(capsys):
    assert cli.main(["zoo", "--kind", "beats"]) == 0
    out = capsys.readouterr().out
    assert "beats_iter3" in out
    assert "internvideo2_1b" not in out
    assert cli.main(["zoo", "test_tiny"]) == 0
    out = capsys.readouterr().out
    assert "blocks/attn/qkv/kernel" in out
    assert "Total: 50,648" in out
    assert "left out, if there" in out
    assert cli.main(["zoo", "internvideo2_huge"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert cli.main(["zoo", "--kind", "bird"]) == 2


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from iv2_jax import cli\n"
        "try: cli.main(['zoo', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'flax', 'numpy', 'torch'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
