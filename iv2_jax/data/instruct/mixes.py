"""Mixes of conversation files: which files, and which part of each (spec stage3 10.5).

```
datasets:
  - json_path: caption/train.json
    data_root: /data/videos
    sampling_strategy: all          # first:1000, end:10%, random:25%
```
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.data.instruct import formats
from iv2_jax.data.instruct.conversations import Conversation, joined
from iv2_jax.data.records import show
from iv2_jax.errors import DataError, nearest

_STRATEGIES = ("all", "first", "end", "random")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)(%?)")
# Field -> the same in the released registries (spec stage3 10.1). What says how files are opened
# is read and not needed: files are told by their content.
_ALIASES = {"anno_path": "json_path"}
_UNUSED = ("media_type", "video_read_type", "video_reader_type")


@dataclasses.dataclass(frozen=True)
class Part:
    """A file of a mix.

    Attributes:
      path: the file.
      root: folder or URL of its media; None: the file's folder.
      strategy: `all`, or `first:N`, `end:N`, `random:N` with N conversations or N% of them
        (rounded up).
      format: see `formats.read`.
    """

    path: str
    root: str | None = None
    strategy: str = "all"
    format: str = "auto"

    def __post_init__(self) -> None:
        _parse(self.strategy)


def _parse(strategy: str) -> tuple[str, float, bool]:
    """Name, number and whether it is in percent.

    Raises:
      DataError: it is none.
    """
    name, colon, rest = strategy.strip().partition(":")
    known = f"known: {', '.join(_STRATEGIES)}, e.g. random:25% or first:1000"
    if name not in _STRATEGIES:
        hint = nearest(name, _STRATEGIES)
        raise DataError(f"sampling_strategy {strategy!r} is not known{hint or '; ' + known}")
    if name == "all":
        if colon:
            raise DataError(f"sampling_strategy {strategy!r}: all has no number; {known}")
        return name, 100.0, True
    number = _NUMBER.fullmatch(rest.strip())
    if number is None:
        raise DataError(f"sampling_strategy {strategy!r} needs a number or percentage; {known}")
    value, percent = float(number[1]), bool(number[2])
    if value <= 0 or (percent and value > 100) or (not percent and value != int(value)):
        raise DataError(
            f"sampling_strategy {strategy!r}: a whole number from 1 on, or a percentage above 0 "
            "and up to 100 is needed"
        )
    return name, value, percent


def choose(strategy: str, count: int, *, seed: int) -> np.ndarray:
    """Which of `count` conversations a strategy takes.

    Args:
      strategy: see `Part`.
      count: conversations that there are.
      seed: of `random`.

    Returns:
      int64 `(n,)`, ascending: the order of the file stays. More than there are means all.

    Raises:
      DataError: the strategy is not known.
    """
    name, value, percent = _parse(strategy)
    wanted = math.ceil(round(value * count / 100, 9)) if percent else int(value)
    wanted = min(wanted, count)
    if name == "end":
        return np.arange(count - wanted, count)
    if name == "random" and wanted < count:
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(6,)))
        return np.sort(rng.choice(count, wanted, replace=False))
    return np.arange(wanted)


def load_mix(path: str | os.PathLike[str]) -> list[Part]:
    """Reads a mix.

    Args:
      path: YAML (or JSON, which is YAML) with a list `datasets`, or a list alone. Paths of files
        and roots are taken from the mix's folder.

    Raises:
      DataError: the file cannot be read; the message names the entry and the field.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: is no YAML: {e}") from e
    if isinstance(found, Mapping):
        if "datasets" not in found:
            raise DataError(f"{path}: `datasets` is missing{nearest('datasets', map(str, found))}")
        found = found["datasets"]
    if not isinstance(found, list) or not found:
        raise DataError(f"{path}: datasets must be a list of files, at least one, is {show(found)}")
    folder = str(Path(path).parent)
    return [_part(entry, f"{path}: datasets[{at}]", folder) for at, entry in enumerate(found)]


def _part(entry: Any, where: str, folder: str) -> Part:
    """One entry of a mix."""
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: must be an object with json_path, is {show(entry)}")
    fields = {"json_path": "path", "data_root": "root", "sampling_strategy": "strategy"}
    fields["format"] = "format"
    values: dict[str, str] = {}
    for key, value in entry.items():
        name = _ALIASES.get(key, key)
        if name in _UNUSED:
            continue
        if name not in fields:
            raise DataError(f"{where}.{key}: unknown field{nearest(str(key), fields)}")
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}.{key}: must be a text, is {show(value)}")
        values[fields[name]] = value
    if "path" not in values:
        raise DataError(f"{where}.json_path is missing")
    for name in ("path", "root"):
        if name in values:
            values[name] = joined(folder, values[name])
    if values.get("format", "auto") not in ("auto", *formats.FORMATS):
        raise DataError(f"{where}.format{nearest(values['format'], ('auto', *formats.FORMATS))}")
    try:
        return Part(**values)
    except DataError as e:
        raise DataError(f"{where}: {e}") from None


def read_mix(
    path: str | os.PathLike[str], *, seed: int = 0, missing: str = "error"
) -> list[Conversation]:
    """Reads the conversations of a mix, or of one file, and says how many each file gave.

    Args:
      path: a mix (`.yaml`, `.yml`), or a file of conversations.
      seed: of the strategy `random`; each file draws for itself, whatever else is in the mix.
      missing: see `formats.read`.

    Returns:
      All conversations, file after file.

    Raises:
      ConfigError: an argument is not known.
      DataError: a file or record cannot be used.
    """
    is_mix = os.fspath(path).lower().endswith((".yaml", ".yml"))
    parts = load_mix(path) if is_mix else [Part(os.fspath(path))]
    chosen: list[Conversation] = []
    for part in parts:
        found = formats.read(part.path, format=part.format, root=part.root, missing=missing)
        own = zlib.crc32(os.path.basename(part.path).encode()) ^ seed
        places = choose(part.strategy, len(found), seed=own)
        chosen += [found[i] for i in places]
        if is_mix:
            print(
                f"iv2: {part.path}: {len(places)} of {len(found)} conversations ({part.strategy})",
                file=sys.stderr,
                flush=True,
            )
    return chosen
