"""Config files become checked dataclasses; every mistake names its field."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    depth: int = 4
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = dataclasses.field(default_factory=Inner)
    maybe: Inner | None = None
    pairs: tuple[tuple[str, float], ...] = ()
    grid: tuple[int, int] | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ConfigError("name must not be 'bad'")


def test_builds_nested_and_round_trips():
    values = {"name": "x", "inner": {"depth": 2}, "pairs": [["p", 1]], "grid": [2, 3]}
    built = config_lib.build(Outer, values)
    assert built == Outer("x", Inner(depth=2), pairs=(("p", 1.0),), grid=(2, 3))
    assert config_lib.build(Outer, config_lib.to_dict(built)) == built


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "iner": {}}, r"config\.iner; did you mean 'inner'"),
        ({"name": "x", "inner": {"dpth": 2}}, r"config\.inner\.dpth; did you mean 'depth'"),
        ({}, r"config\.name must be given \(str\)"),
        ({"name": 3}, r"config\.name must be str, not 3 \(int\)"),
        ({"name": "x", "inner": {"depth": 2.5}}, r"config\.inner\.depth must be int"),
        ({"name": "x", "inner": {"depth": True}}, r"config\.inner\.depth must be int, not True"),
        ({"name": "x", "flag": 1}, r"config\.flag must be bool"),
        ({"name": "x", "inner": {"kind": "c"}}, r"kind must be one of \['a', 'b'\]"),
        ({"name": "x", "grid": [1]}, r"config\.grid must have 2 values"),
        ({"name": "x", "pairs": "ab"}, r"config\.pairs must be"),
        ({"name": "x", "maybe": 3}, r"config\.maybe must be Inner"),
        ({"name": "bad"}, r"config: name must not be 'bad'"),
    ],
)
def test_mistakes_name_the_field(values, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.build(Outer, values)


def test_overrides_reach_any_field_and_keep_types():
    overrides = config_lib.split_overrides(
        [
            "--config.inner.depth=7",
            "--config.maybe.rate",
            "1",
            "--config.name=7b",
            "--config.grid=(1,2)",
        ]
    )
    built = config_lib.apply_overrides(Outer, {"name": "x"}, overrides)
    assert built == Outer("7b", Inner(depth=7), maybe=Inner(rate=1.0), grid=(1, 2))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.inner.dept=3", r"config\.inner\.dept; did you mean 'depth'"),
        ("--config.inner.depth=deep", r"config\.inner\.depth must be int, not 'deep'"),
        ("--config.name", "has no value"),
        ("--cfg.name=3", "unknown argument"),
    ],
)
def test_bad_overrides(argument, message):
    with pytest.raises(ConfigError, match=message):
        config_lib.apply_overrides(Outer, {"name": "x"}, config_lib.split_overrides([argument]))


def test_reads_a_file_with_an_argument(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("def get_config(arg='x'):\n    return {'name': arg}\n")
    assert config_lib.read_config_file(str(file)) == {"name": "x"}
    assert config_lib.read_config_file(f"{file}:tiny") == {"name": "tiny"}
    with pytest.raises(ConfigError, match="no config file"):
        config_lib.read_config_file(str(tmp_path / "absent.py"))
    file.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="no function get_config"):
        config_lib.read_config_file(str(file))
