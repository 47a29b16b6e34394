"""What a training step carries: step, parameters, optimizer state, moving average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from iv2_jax.parallel.mesh import replicated
from iv2_jax.parallel.rules import path_name


@flax.struct.dataclass
class TrainState:
    """The state of a run; all randomness is derived from the seed and `step`.

    Attributes:
      step: () int32, steps done.
      params: Nested dict of parameters.
      opt_state: Optax state.
      ema: Moving average of `params`, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


def create(params: Any, tx: optax.GradientTransformation, *, with_ema: bool) -> TrainState:
    """A fresh state at step 0 around `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if with_ema else None,
    )


def state_shardings(
    abstract: TrainState, param_shardings: Any, mesh: Mesh, moment_shardings: Any = None
) -> TrainState:
    """Shardings of a state: moments and average lie like their parameters, the rest replicated.

    A leaf of the optimizer state belongs to the parameter whose path its own path ends in.
    `moment_shardings`, of the same structure, are those of moments and average where they differ.
    """

    def by_path(tree: Any) -> dict[str, NamedSharding]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_name(path): sharding for path, sharding in leaves}

    params = by_path(param_shardings)
    moments = params if moment_shardings is None else by_path(moment_shardings)
    whole = replicated(mesh)

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        del leaf
        keys = path_name(path).split("/")
        table = params if keys[0] == "params" else moments
        suffixes = ("/".join(keys[i:]) for i in range(len(keys)))
        return next((table[suffix] for suffix in suffixes if suffix in table), whole)

    return jax.tree_util.tree_map_with_path(one, abstract)


def keep_if(keep: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` where `keep`, a () bool, is true; else `old`, with the step counted all the same."""
    kept = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
    return kept.replace(step=new.step)


def apply_gradients(
    state: TrainState,
    grads: Any,
    tx: optax.GradientTransformation,
    ema_decay: float,
    project: Callable[[Any], Any] = lambda params: params,
) -> TrainState:
    """One optimizer step; `project` brings the parameters back to where they may be."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = project(optax.apply_updates(state.params, updates))
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda a, p: a * ema_decay + p * (1 - ema_decay), ema, params)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
