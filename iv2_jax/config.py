"""Config files -> checked frozen dataclasses.

A config file is Python with `get_config(arg="")` that returns an `ml_collections.ConfigDict`; it
holds only what differs from the defaults of the stage's run dataclass. `load` reads it, lays
command-line overrides on top and builds the dataclass once: types, ranges and cross checks happen
there, an unknown field is an error that names the nearest known one, and nothing after that is
looked up by string.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import importlib.util
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from iv2_jax.errors import ConfigError, nearest

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds the frozen dataclass `cls` from nested plain values.

    Args:
      cls: A dataclass type; its field annotations are the schema.
      values: Nested mappings, lists and scalars; missing fields take their defaults.
      path: Where `values` sits, for messages.

    Raises:
      ConfigError: Unknown or missing field, or a value of the wrong type; names the field.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in values:
        if name not in fields:
            raise ConfigError(f"unknown field {path}.{name}{nearest(name, fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{path}.{name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}.{name} must be given ({_type_name(hints[name])})")
    try:
        return cls(**arguments)
    except ConfigError as error:
        if str(error).startswith(path):
            raise
        raise ConfigError(f"{path}: {error}") from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Converts one value to the annotated type, or raises a ConfigError that names its path."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is typing.Literal:
        if value in args:
            return value
        hint_text = nearest(str(value), map(str, args))
        raise ConfigError(f"{path} must be one of {list(args)}, not {value!r}{hint_text}")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _wrong_type(hint, value, path)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise ConfigError(f"{path} must have {len(args)} values, not {len(value)}: {value!r}")
        return tuple(
            _convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong_type(hint, value, path)
        value_hint = args[1] if args else Any
        return {str(k): _convert(value_hint, v, f"{path}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise _wrong_type(hint, value, path)
        return build(hint, value, path)
    return _convert_scalar(hint, value, path)


def _convert_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    """Takes the first member that fits; with one dataclass member its own error is the message."""
    if value is None and type(None) in args:
        return None
    members = [a for a in args if a is not type(None)]
    if len(members) == 1:
        return _convert(members[0], value, path)
    for member in members:
        try:
            return _convert(member, value, path)
        except ConfigError:
            continue
    raise ConfigError(
        f"{path} must be {' or '.join(map(_type_name, args))}, not {value!r} "
        f"({type(value).__name__})"
    )


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    """Checks a bool, int, float, str or enum."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        names = [str(m.value) for m in hint]
        if isinstance(value, hint):
            return value
        if value in names:
            return hint(value)
        raise ConfigError(
            f"{path} must be one of {names}, not {value!r}{nearest(str(value), names)}"
        )
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, int | float) and not is_bool:
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint in (int, str, bool) and isinstance(value, hint) and (hint is bool or not is_bool):
        return value
    raise _wrong_type(hint, value, path)


def _wrong_type(hint: Any, value: Any, path: str) -> ConfigError:
    return ConfigError(f"{path} must be {_type_name(hint)}, not {value!r} ({type(value).__name__})")


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def to_dict(config: Any) -> Any:
    """A dataclass as nested plain values: JSON-ready, and what `build` takes back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init
        }
    if isinstance(config, enum.Enum):
        return config.value
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(v) for v in config]
    return config


def read_config_file(spec: str) -> dict[str, Any]:
    """Runs `get_config` of `FILE.py[:arg]`, or reads the `config.json` that a run saved.

    Raises:
      ConfigError: No such file, no `get_config`, or it raised (the cause is chained).
    """
    file, _, argument = spec.partition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"no config file {file!r}; the shipped ones are under configs/")
    if path.suffix == ".json":
        return json.loads(path.read_text())
    module_spec = importlib.util.spec_from_file_location(f"iv2_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file} has no function get_config(arg='')")
    values = module.get_config(argument) if argument else module.get_config()
    return values.to_dict() if hasattr(values, "to_dict") else dict(values)


def split_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """`["--config.a.b=1"]` -> `{"a.b": "1"}`; both `--config.a=1` and `--config.a 1` are read.

    Raises:
      ConfigError: An argument that is not an override, or one without a value.
    """
    overrides, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--config."):
            raise ConfigError(
                f"unknown argument {argument!r}; config fields are set as --config.field=value"
            )
        name, equals, value = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--config.{name} has no value")
            value = rest.pop(0)
        overrides[name] = value
    return overrides


def apply_overrides(cls: type, values: dict[str, Any], overrides: Mapping[str, str]) -> Any:
    """Builds `cls` from `values`, then sets each dotted field of `overrides` and builds again.

    Values are Python literals (`0.1`, `True`, `None`, `(1, 2)`, `[1, 2]`); what is no literal is
    a string. Fields are looked up in the dataclasses, so any field can be set, whether the file
    mentions it or not.

    Raises:
      ConfigError: A field that does not exist (with the nearest name) or a value that does not fit.
    """
    if not overrides:
        return build(cls, values)
    # Overrides are laid over the raw values, not over a built config: the file alone may be
    # incomplete, its missing field being what the command line gives.
    raw = to_dict(values)
    for dotted, text in overrides.items():
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        _set_field(cls, raw, dotted, value)
    return build(cls, raw)


def _set_field(cls: type, raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets `dotted` in the nested dict `raw`, creating the dicts on the way to it.

    Fields of dataclasses are looked up; keys of dicts are taken as they come (`data.media.video`);
    entries of lists are named by number and must be there (`init.0.path`).
    """
    node, schema, walked = raw, cls, "config"
    names = dotted.split(".")
    for i, name in enumerate(names):
        key, schema = _look_up(node, schema, name, walked)
        walked = f"{walked}.{name}"
        if i == len(names) - 1:
            node[key] = value
            return
        if isinstance(node, dict) and not isinstance(node.get(key), dict | list):
            node[key] = {}
        node = node[key]


def _look_up(node: Any, schema: Any, name: str, walked: str) -> tuple[str | int, Any]:
    """Key of a field in the raw values, and the schema of what is in it (None: anything)."""
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            raise ConfigError(f"{walked} has entries 0 to {len(node) - 1}, {walked}.{name} is none")
        return int(name), typing.get_args(schema)[0] if schema else None
    if dataclasses.is_dataclass(schema):
        hints = typing.get_type_hints(schema)
        if name not in hints:
            raise ConfigError(f"unknown field {walked}.{name}{nearest(name, hints)}")
        return name, _nested(hints[name])
    if typing.get_origin(schema) is tuple:
        raise ConfigError(f"{walked} has no entries to set {name!r} of; give the whole list")
    if typing.get_origin(schema) in (dict, Mapping):
        return name, _nested(typing.get_args(schema)[1])
    return name, None


def _nested(hint: Any) -> Any:
    """What fields can be looked up in of an annotation (`X`, `X | None`), or None."""
    for candidate in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(candidate):
            # A dict or tuple of dataclasses is walked through by key or number.
            return hint if typing.get_origin(hint) in (dict, Mapping, tuple) else candidate
    return None
