"""A stage laid out on a mesh: the compiled functions of the loop, and the shapes to plan with."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview
from flax.core import meta
from jax.sharding import Mesh

from iv2_jax.parallel import rules
from iv2_jax.parallel.distributed import put
from iv2_jax.parallel.mesh import MeshConfig, batch_sharding, check_batch_size, replicated
from iv2_jax.parallel.tpu import compiler_options
from iv2_jax.train import accumulate, optim
from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train import state as state_lib
from iv2_jax.train.stage import RunConfig, Stage
from iv2_jax.train.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """A stage on a mesh: what the loop calls, and the shapes a planner can compile ahead of time.

    Attributes:
      mesh: Device mesh.
      abstract_state: Shapes, dtypes and shardings of the state.
      init: key -> fresh state, sharded.
      train_step: (state, frozen, batch, key) -> (state, metrics); donates the state.
      eval_step: (params, frozen, batch, key) -> metrics.
      report: Tables of parameters, groups and sharding, to print.
      abstract_frozen: Shapes, dtypes and shardings of the frozen weights.
      abstract_batches: The same of the arrays of each kind of batch.
      sharding: How each parameter is split.
      frozen_sharding: The same of the frozen weights.
    """

    mesh: Mesh
    abstract_state: TrainState
    init: Callable[[jax.Array], TrainState]
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., dict[str, jax.Array]]
    report: str
    abstract_frozen: Any
    abstract_batches: dict[str, dict[str, jax.ShapeDtypeStruct]]
    sharding: list[rules.ShardedParameter]
    frozen_sharding: list[rules.ShardedParameter]

    def step_arguments(self, kind: str) -> tuple[Any, ...]:
        """Abstract arguments of `train_step` for a kind of batch."""
        key = jax.eval_shape(jax.random.key, 0)
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(self.mesh))
        return self.abstract_state, self.abstract_frozen, self.abstract_batches[kind], key

    def compile_steps(self) -> dict[str, jax.stages.Compiled]:
        """The training step of each kind of batch, compiled; none is compiled in mid-run."""
        steps = {}
        for kind in self.abstract_batches:
            start = time.monotonic()
            steps[kind] = self.train_step.lower(*self.step_arguments(kind)).compile()
            named = f"the step of {kind}" if kind else "the step"
            logger.info("compiled %s in %.1f s", named, time.monotonic() - start)
        return steps


def build_program(config: RunConfig, stage: Stage, mesh: Mesh) -> Program:
    """Lays a stage out on a mesh; allocates nothing.

    Raises:
      ConfigError: Batch and mesh do not fit, or an optimizer pattern matches nothing.
    """
    check_batch_size(config.batch_size, mesh, stage.parts)
    schedule = optim.learning_rate(config.optimizer, config.steps, config.batch_size)
    boxed = jax.eval_shape(stage.init_params, jax.random.key(0))
    param_shardings, rows = rules.shardings(boxed, mesh, config.mesh)
    frozen_shardings, frozen_rows = rules.shardings(stage.abstract_frozen(), mesh, config.mesh)
    abstract_params = meta.unbox(boxed)
    tx = optim.make_optimizer(config.optimizer, schedule, abstract_params)
    train_mask = optim.trainable(config.optimizer, abstract_params)

    def create(key: jax.Array) -> TrainState:
        params = meta.unbox(stage.init_params(key))
        return state_lib.create(params, tx, with_ema=config.optimizer.ema_decay > 0)

    def loss_of(params: Any, *args: Any, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        # Attention kernels are split over the mesh by hand, so they must see it.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return stage.loss_fn(params, *args, train=train)

    def train_step(
        state: TrainState, frozen: Any, batch: Any, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(key, state.step)

        def gradients(part: Any, rng: jax.Array) -> tuple[Any, Any]:
            def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
                # Nothing is differentiated on the way to frozen parameters only.
                params = jax.tree.map(
                    lambda p, keep: p if keep else jax.lax.stop_gradient(p), params, train_mask
                )
                return loss_of(params, frozen, part, rng, train=True)

            return jax.value_and_grad(loss_fn, has_aux=True)(state.params)

        whole_batch = stage.weigh(batch)
        if stage.parts == 1:
            (loss, terms), grads = gradients(whole_batch, rng)
        else:
            (loss, terms), grads = accumulate.mean_over_parts(
                gradients, whole_batch, rng, stage.parts, state.params, train_mask, mesh
            )
        trained = jax.tree.map(lambda g, keep: g if keep else None, grads, train_mask)
        metrics = {
            "loss": loss,
            **terms,
            "lr": schedule(state.step),
            "grad_norm": optax.tree.norm(trained),
        }
        new = state_lib.apply_gradients(state, grads, tx, config.optimizer.ema_decay, stage.project)
        if config.on_nan == "skip":
            finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
            new = state_lib.keep_if(finite, new, state)
        return new, metrics

    def eval_step(params: Any, frozen: Any, batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        loss, terms = loss_of(params, frozen, stage.weigh(batch), key, train=False)
        return {"loss": loss, **terms}

    abstract = jax.eval_shape(create, jax.random.key(0))
    moments = None
    if config.mesh.shard_optimizer:
        moments = rules.spread_over_data(param_shardings, abstract_params)
    shardings = state_lib.state_shardings(abstract, param_shardings, mesh, moments)
    whole = replicated(mesh)
    overview = parameter_overview.get_parameter_overview(
        abstract_params, include_stats=False, max_lines=60
    )
    report = "\n".join(
        [
            overview,
            "optimizer groups:",
            optim.describe(config.optimizer, abstract_params),
            f"mesh: {dict(mesh.shape)}; {rules.describe(rows)}",
        ]
    )
    return Program(
        mesh=mesh,
        abstract_state=checkpoint_lib.abstract_like(abstract, shardings),
        init=jax.jit(create, out_shardings=shardings),
        train_step=jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(shardings, whole),
            compiler_options=compiler_options(mesh),
        ),
        eval_step=jax.jit(eval_step, out_shardings=whole),
        report=report,
        abstract_frozen=_placed(meta.unbox(stage.abstract_frozen()), frozen_shardings),
        abstract_batches={
            kind: _placed(arrays, jax.tree.map(lambda _: batch_sharding(mesh), arrays))
            for kind, arrays in stage.abstract_batches(config.batch_size).items()
        },
        sharding=rows,
        frozen_sharding=frozen_rows,
    )


def put_frozen(stage: Stage, mesh: Mesh, config: MeshConfig | None = None) -> Any:
    """Loads frozen weights onto the mesh, sharded by the same table as trained ones."""
    shardings, _ = rules.shardings(stage.abstract_frozen(), mesh, config)
    return jax.tree.map(put, stage.load_frozen(), shardings)


def _placed(abstract: Any, shardings: Any) -> Any:
    """Abstract arrays with their shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=s),
        abstract,
        shardings,
    )
