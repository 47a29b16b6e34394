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


def state_shardings(abstract: TrainState, param_shardings: Any, mesh: Mesh) -> TrainState:
    """Shardings of a state: moments and average lie like their parameters, the rest replicated.

    A leaf of the optimizer state belongs to the parameter whose path its own path ends in.
    """
    table = {
        path_name(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(param_shardings)
    }
    whole = replicated(mesh)

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        del leaf
        keys = path_name(path).split("/")
        suffixes = ("/".join(keys[i:]) for i in range(len(keys)))
        return next((table[suffix] for suffix in suffixes if suffix in table), whole)

    return jax.tree_util.tree_map_with_path(one, abstract)


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
