"""What a chip can do and costs: the tables `chips.json` and `prices.json`, read and checked."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iv2_jax.errors import ConfigError, nearest


@dataclass(frozen=True)
class Device:
    """What JAX calls a device: a chip, or one of a v7x chip's two halves.

    Attributes:
      peak: bfloat16 FLOP/s.
      hbm_bytes: Memory.
      hbm_bandwidth: Bytes/s between memory and chip.
      ici_link: Bytes/s of one link in one direction.
      ici_links: Links.
      dcn: Bytes/s to other slices.
      clock: Cycles/s.
      per_chip: Devices of a chip.
    """

    peak: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_link: float
    ici_links: int
    dcn: float
    clock: float
    per_chip: int


@dataclass(frozen=True)
class Prices:
    """A table of prices.

    Attributes:
      currency: Of all of them.
      chip_hour: Chip -> price of an hour.
      note: Where they come from.
    """

    currency: str
    chip_hour: Mapping[str, float]
    note: str = ""

    def of(self, chip: str) -> float:
        """Price of one chip for an hour.

        Raises:
          ConfigError: The table has no such chip.
        """
        if chip not in self.chip_hour:
            known = nearest(chip, self.chip_hour)
            raise ConfigError(f"the price table has no chip_hour.{chip}{known}")
        return self.chip_hour[chip]


def device(chip: str) -> Device:
    """The figures of one device of a chip.

    Raises:
      ConfigError: The table has no such chip.
    """
    table = chip_table()["chips"]
    if chip not in table:
        raise ConfigError(f"chips.json has no chip {chip!r}{nearest(chip, table)}")
    row = table[chip]
    share = row["devices"]
    return Device(
        peak=row["peak_bf16"] / share,
        hbm_bytes=row["hbm_bytes"] // share,
        hbm_bandwidth=row["hbm_bandwidth"] / share,
        # Two devices of a chip share its links.
        ici_link=row["ici_link"] / share,
        ici_links=row["ici_links"],
        dcn=row["dcn"] / share,
        clock=row["peak_bf16"] / row["mxu_flops_per_cycle"],
        per_chip=share,
    )


@functools.cache
def chip_table() -> dict[str, Any]:
    """The table of chips as it is in the package, with its sources."""
    return json.loads(_packaged("chips.json"))


def prices(file: str | None = None) -> Prices:
    """The package's price table, or the one in `file`.

    Raises:
      ConfigError: The file is missing, no JSON, or lacks a field; the message names it.
    """
    if file is None:
        text, where = _packaged("prices.json"), "prices.json"
    elif not Path(file).is_file():
        raise ConfigError(f"--prices: no file {file!r}")
    else:
        text, where = Path(file).read_text(), file
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    hours = values.get("chip_hour") if isinstance(values, dict) else None
    if not isinstance(hours, dict) or not all(isinstance(v, int | float) for v in hours.values()):
        raise ConfigError(
            f'{where} needs "chip_hour": {{"v5p": 4.2, ...}}, the price of one chip for an hour'
        )
    names = {f.name for f in dataclasses.fields(Prices)}
    given = {name: value for name, value in values.items() if name in names}
    return Prices(**{"currency": "USD"} | given)


def _packaged(name: str) -> str:
    return (importlib.resources.files("iv2_jax.parallel") / name).read_text()
