"""Optimizer moments in bfloat16: their bytes, the same learning, and exact resumption."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.parallel.mesh import make_mesh
from iv2_jax.parallel.plan.compile import held_bytes
from iv2_jax.train import loop, optim
from iv2_jax.train.checkpoint import load_params
from iv2_jax.train.program import build_program
from tests.train import toy

SMALL = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
RATES = {"lr": 0.02, "warmup_steps": 2, "scale_lr_by_batch": False}


def _program(**moments):
    config = toy.config(optimizer=RATES | moments, width=64, steps=100)
    return build_program(config, config.make_stage(), make_mesh(config.mesh))


@pytest.mark.parametrize(
    ("moments", "size"),
    [({}, 8), ({"mu_dtype": "bfloat16"}, 6), (SMALL, 4)],
    ids=["f32", "mu", "both"],
)
def test_the_plan_counts_their_bytes(moments, size):
    program = _program(**moments)
    held, count = held_bytes(program, ""), 64 * 64 + 64
    assert held["parameters"] == 4 * count
    assert held["optimizer state"] == pytest.approx(size * count, abs=16)  # and two counters


def _losses(**moments):
    program = _program(**moments)
    state, found = program.init(jax.random.key(0)), []
    for step in range(100):
        x = jax.random.normal(jax.random.key(100 + step), (8, 64))
        state, metrics = program.train_step(state, {}, {"x": x}, jax.random.key(2))
        found.append(float(metrics["loss"]))
    return np.asarray(found)


def test_losses_stay_within_a_hundredth():
    exact = _losses()
    assert exact[-1] < 0.2 * exact[0]
    for moments in ({"mu_dtype": "bfloat16"}, SMALL):
        np.testing.assert_allclose(_losses(**moments), exact, rtol=0.01)


def test_a_run_that_goes_on_draws_what_an_unbroken_one_does(tmp_path):
    given = {"optimizer": RATES | SMALL}
    loop.train(toy.config(**given), tmp_path / "a")
    loop.train(toy.config(**given, stop_after=5), tmp_path / "b")
    loop.train(toy.config(**given), tmp_path / "b")
    a, b = (load_params(tmp_path / name)[0] for name in "ab")
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_rounding_keeps_the_mean_and_what_bfloat16_holds():
    x = jnp.float32(1.0) + jnp.arange(8, dtype=jnp.float32) / 1024  # an eighth of a step apart
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: optim.round_at_random(x, key))(keys).astype(jnp.float32)
    assert set(np.unique(drawn)) == {1.0, 1.0 + 2**-7}
    np.testing.assert_allclose(drawn.mean(0), x, atol=5 * 2**-7 * 0.5 / 4000**0.5)
    held = jnp.asarray([0.0, 1.5, -3.0, jnp.inf], jnp.float32)
    np.testing.assert_array_equal(optim.round_at_random(held, keys[0]).astype(jnp.float32), held)
