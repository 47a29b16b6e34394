"""What a run starts from: its own newest checkpoint, another's weights, or fresh ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iv2_jax import config as config_lib
from iv2_jax.errors import CheckpointError, ConfigError, nearest
from iv2_jax.parallel.distributed import put
from iv2_jax.parallel.rules import path_name
from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train.program import Program
from iv2_jax.train.stage import RunConfig, Stage
from iv2_jax.train.state import TrainState

logger = logging.getLogger(__name__)


def starting_state(
    config: RunConfig,
    workdir: Path,
    stage: Stage,
    program: Program,
    checkpointer: checkpoint_lib.Checkpointer,
    plain_config: dict[str, Any],
) -> TrainState:
    """The state that a run starts from: resumed, `init_from`, or the stage's own; says which.

    Raises:
      CheckpointError: The workdir holds another run, or weights do not fit.
    """
    latest = checkpointer.latest_step()
    if latest is not None:
        if config.resume == "never":
            raise CheckpointError(
                f"{workdir} already holds a run at step {latest}, and resume is 'never'; "
                "take another --workdir, or resume=auto to go on"
            )
        if config.resume != "force":
            saved = _with_newer_fields(config, checkpointer.saved_config())
            checkpoint_lib.check_same_run(saved, plain_config, workdir)
        state, data, _ = checkpointer.restore(program.abstract_state)
        checkpointer.discard_after(int(state.step))
        logger.info("resumed %s at step %d (data: %s)", workdir, int(state.step), data)
        return state
    with jax.transfer_guard("allow"):
        state = program.init(jax.random.key(config.seed))
    if config.init_from:
        params, _ = checkpoint_lib.load_params(config.init_from)
        params = fit_params(params, program.abstract_state.params, config.init_from)
        ema = None if state.ema is None else jax.tree.map(lambda x: x.copy(), params)
        state = state.replace(params=params, ema=ema)
        logger.info("step 0 with the weights of %s (init_from)", config.init_from)
        return state
    given = stage.starting_params()
    state = state.replace(params=lay_over(state.params, given))
    if state.ema is not None:
        state = state.replace(ema=jax.tree.map(lambda x: x.copy(), state.params))
    taken = sum(x.size for x in jax.tree.leaves(given))
    logger.info("step 0: seed %d, %d values out of weight files", config.seed, taken)
    return state


def _with_newer_fields(config: RunConfig, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with fields that came after it at their defaults, which change nothing.

    One that can no longer be read as a config comes back as it is, to be compared field by field.
    """
    try:
        return config_lib.to_dict(config_lib.build(type(config), saved))
    except ConfigError:
        return saved


def fit_params(params: Any, abstract: Any, source: str) -> Any:
    """Puts host parameters onto the shardings of `abstract`, which they must match one to one.

    Raises:
      CheckpointError: Missing, unexpected or mis-shaped parameters; lists the first ten of each.
    """
    have = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    want = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(abstract)}
    problems = [f"  missing: {n}{nearest(n, have)}" for n in sorted(want.keys() - have.keys())[:10]]
    problems += [f"  unexpected: {n}" for n in sorted(have.keys() - want.keys())[:10]]
    problems += [
        f"  {n}: shape {have[n].shape}, expected {want[n].shape}"
        for n in sorted(have.keys() & want.keys())
        if tuple(have[n].shape) != tuple(want[n].shape)
    ][:10]
    if problems:
        raise CheckpointError(f"weights of {source} do not fit this model:\n" + "\n".join(problems))
    return jax.tree_util.tree_map_with_path(
        lambda p, x: put(have[path_name(p)].astype(x.dtype), x.sharding), abstract
    )


def lay_over(params: Any, given: Any) -> Any:
    """`params` with the arrays of `given`, host arrays in a part of their tree.

    Raises:
      CheckpointError: `given` has a parameter that `params` has not, or of another shape.
    """
    have = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(given)}
    want = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    for name, array in have.items():
        if name not in want:
            raise CheckpointError(f"starting weights: no parameter {name!r}{nearest(name, want)}")
        if tuple(array.shape) != tuple(want[name].shape):
            raise CheckpointError(
                f"starting weights: {name} has shape {tuple(array.shape)}, the model's has "
                f"{tuple(want[name].shape)}"
            )

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        array = have.get(path_name(path))
        return x if array is None else put(np.asarray(array, x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(one, params)
