"""`iv2 assemble`: the starting weights of a config, put together from the files it names."""

from __future__ import annotations

import argparse

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument(
        "--config", required=True, help="FILE.py[:argument], or the config.json that a run saved"
    )
    parser.add_argument(
        "--out",
        required=True,
        help="checkpoint to write: for `init_from`, `iv2 export`, `iv2 eval`",
    )
    parser.epilog = """\
a stage-2 or CLIP run does the same at step 0; this shows what comes from where and keeps it:
  iv2 assemble --config configs/clip/internvideo2_clip.py:1b --out clip_1b_start \\
      --config.init.0.path=InternVideo2-stage2_1b-224p-f4.pt \\
      --config.init.1.path=internvl_c_13b_224px.pth
"""


def run(args: argparse.Namespace) -> int:
    """Writes the checkpoint and says what came from where."""
    import jax
    from flax.core import meta

    from iv2_jax import config as config_lib
    from iv2_jax.errors import ConfigError
    from iv2_jax.interop import load, run_config
    from iv2_jax.train import init_towers, loop, starting

    config = loop.read_config(args.config, config_lib.split_overrides(args.overrides))
    inits = getattr(config, "init", ())
    if not inits:
        raise ConfigError(f"{args.config}: config.init names no weights to put together")
    model = run_config.read_run(config_lib.to_dict(config))
    stage = config.make_stage()
    assembly = init_towers.assemble(inits, model)
    for line in assembly.lines:
        print(line)
    # On the host's CPU: a model that a mesh has to share fits here all the same.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = meta.unbox(jax.jit(stage.init_params)(jax.random.key(config.seed)))
        params = starting.lay_over(params, assembly.params)
    source = ", ".join(f"{init.tower}: {init.path}" for init in inits)
    folder = load.save_checkpoint(jax.device_get(params), model, args.out, source=source)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{count:,} parameters in {folder}")
    return 0
