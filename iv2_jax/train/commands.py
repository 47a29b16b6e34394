"""`iv2 train`."""

from __future__ import annotations

import argparse

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--config", required=True, help="FILE.py[:argument], or the config.json that a run saved"
    )
    parser.add_argument(
        "--workdir", required=True, help="checkpoints and metrics go there; a run in it goes on"
    )
    parser.add_argument(
        "--show-config", action="store_true", help="print the resolved config and do nothing"
    )
    parser.add_argument(
        "--profile",
        default="",
        metavar="STEPS",
        help="trace these steps into WORKDIR/profile: 20, 20:22 (both included) or 20:22,90:92",
    )
    several = parser.add_argument_group("several processes, one a host (a TPU slice needs none)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="which this one is, from 0")
    parser.epilog = """\
any field of the config is set by --config.FIELD=VALUE:
  iv2 train --config configs/demo/stage1.py --workdir runs/a --config.optimizer.lr=3e-4
  iv2 train --config configs/stage1/internvideo2_1b.py --workdir gs://bucket/run \\
      --config.mesh.fsdp=16 --config.clip_teacher.options.weights=internvl_c_13b_224px.pth
  iv2 train --config runs/a/config.json --workdir runs/b --config.init_from=runs/a
"""


def run(args: argparse.Namespace) -> int:
    """Trains; returns the run's exit code."""
    import json

    from iv2_jax import config as config_lib
    from iv2_jax.parallel import distributed
    from iv2_jax.train import loop, profiling

    config = loop.read_config(args.config, config_lib.split_overrides(args.overrides))
    if args.show_config:
        print(json.dumps(config_lib.to_dict(config), indent=2))
        return loop.EXIT_OK
    steps = profiling.read_steps(args.profile)
    with distributed.leaving_on_error("iv2 train"):
        distributed.start(distributed.joining(args.coordinator, args.processes, args.process))
        return loop.train(config, args.workdir, profile=steps).exit_code
