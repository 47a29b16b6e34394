"""What `iv2 plan` does with its arguments."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import jax

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError
from iv2_jax.parallel import described
from iv2_jax.parallel.plan import hardware, page, report, search
from iv2_jax.parallel.plan.planning import make_plan
from iv2_jax.train.loop import read_config


def run(args: argparse.Namespace) -> int:
    """Plans or searches, prints and writes what was asked for; 0 when something fits."""
    # Compiled for devices that are not here: nothing that a later run could take from a cache.
    jax.config.update("jax_enable_compilation_cache", False)
    overrides = config_lib.split_overrides(args.overrides)
    config = read_config(args.config, overrides)
    topology = described.topology(args.topology, args.slices)
    prices = hardware.prices(args.prices)
    prices.of(topology.chip)
    if args.samples is not None and args.samples <= 0:
        raise ConfigError(f"--samples must be positive, not {args.samples:g}")
    name = " ".join([args.config, *(f"{k}={v}" for k, v in overrides.items())])
    for flag in ("hlo", "markdown"):
        if args.search and getattr(args, flag):
            raise ConfigError(f"--{flag} goes with one plan, not with --search")
    if args.search:
        found = search.search(
            config,
            topology,
            name=name,
            prices=prices,
            samples=args.samples,
            batches=args.batches,
            fsdp=args.fsdp,
            remat=args.remat,
            said=lambda line: print(line, flush=True),
        )
        print(search.text(found))
        plans = [trial.plan for trial in found if trial.plan is not None]
        values = {"trials": [trial.to_dict() for trial in found]}
    else:
        folder = Path(args.hlo) if args.hlo else None
        plans = [
            make_plan(config, topology, name=name, prices=prices, samples=args.samples, hlo=folder)
        ]
        said = report.text(plans[0], sharding=args.sharding, operations=args.operations)
        print(said)
        values = plans[0].to_dict()
        if args.markdown:
            command = shlex.join(["iv2", *sys.argv[1:]])
            _write(args.markdown, report.markdown(values, said, command))
    if args.json:
        _write(args.json, json.dumps(values, indent=1) + "\n")
    if args.html:
        _write(args.html, page.html(plans))
    return 0 if any(plan.fits for plan in plans) else 1


def _write(file: str, text: str) -> None:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path}")
