"""A stage small enough to run the loop hundreds of steps: a linear map learned from noisy pairs."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from iv2_jax.train.stage import RunConfig, Stage


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    """Width of the map, and a step at which a batch turns to NaN (-1 = never)."""

    width: int = 16
    nan_at: int = -1

    def make_stage(self) -> ToyStage:
        return ToyStage(self)


class Model(nn.Module):
    """One dense layer with logical axis names."""

    width: int

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("embed", "mlp"))
        return nn.Dense(self.width, kernel_init=init, name="dense")(x)


class ToyStage(Stage):
    """Learns y = -x under noise drawn from the step's key."""

    def __init__(self, config):
        self.config = config
        self.model = Model(config.width)

    def init_params(self, rng):
        return self.model.init(rng, jnp.zeros((1, self.config.width)))["params"]

    def abstract_frozen(self):
        return {}

    def abstract_batches(self, batch_size):
        return {"": {"x": jax.ShapeDtypeStruct((batch_size, self.config.width), jnp.float32)}}

    def tokens_per_clip(self, kind=""):
        return 1

    def loss_fn(self, params, frozen, batch, rng, *, train):
        x = batch["x"]
        noise = 0.1 * jax.random.normal(rng, x.shape) if train else 0.0
        error = self.model.apply({"params": params}, x + noise) + x
        return jnp.mean(error**2), {"error": jnp.mean(jnp.abs(error))}

    def _batch(self, step):
        rng = np.random.default_rng((self.config.seed, step))
        x = rng.normal(size=(self.config.batch_size, self.config.width)).astype(np.float32)
        if step == self.config.nan_at:
            x[0, 0] = np.nan
        index = np.arange(step * len(x), (step + 1) * len(x), dtype=np.int32)
        batch = {"x": x, "index": index, "replaced": np.zeros(len(x), np.int32)}
        rows = len(x) // jax.process_count()
        own = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
        return {name: array[own] for name, array in batch.items()}

    def train_batches(self, start_step):
        step = start_step
        while True:
            yield self._batch(step)
            step += 1

    def eval_batches(self):
        yield self._batch(10**6)


def config(**fields) -> ToyConfig:
    """A 12-step run that checkpoints every 4 steps."""
    from iv2_jax import config as config_lib

    values = {
        "stage": "toy",
        "steps": 12,
        "batch_size": 8,
        "optimizer": {"lr": 0.05, "warmup_steps": 2, "scale_lr_by_batch": False},
        "checkpoint": {"every": 4},
        "tensorboard": False,
        "mesh": {"max_devices": 1},
    }
    return config_lib.build(ToyConfig, {**values, **fields})
