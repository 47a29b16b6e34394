from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models.block_stack import Block, resolve_layers, scan_blocks

DEPTH, WIDTH = 4, 16


class Stack(nn.Module):
    """Calls `scan_blocks` as a model does."""

    depth: int = DEPTH
    options: tuple = ()
    fold: bool = False

    def setup(self):
        self.blocks = Block(
            WIDTH, num_heads=2, mlp_width=24, layer_scale_init=0.5, fold_layer_scale=self.fold
        )

    def __call__(self, x, return_layers=(), train=False):
        return scan_blocks(
            self.blocks,
            x,
            depth=self.depth,
            return_layers=return_layers,
            train=train,
            **dict(self.options),
        )


def _tokens(batch=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 5, WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return meta.unbox(jax.jit(Stack().init)(jax.random.key(0), _tokens())["params"])


WEIGHTS = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 5, WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def looped(params):
    """All block outputs, one block after the other, and gradients of a weighted sum of three."""
    block = Block(WIDTH, num_heads=2, mlp_width=24)

    def loss(params, x):
        outputs = []
        for i in range(DEPTH):
            x = block.apply({"params": jax.tree.map(lambda p, i=i: p[i], params["blocks"])}, x)
            outputs.append(x)
        chosen = jnp.stack([outputs[0], outputs[2], outputs[3]])
        return jnp.sum(WEIGHTS * chosen), jnp.stack(outputs)

    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, _tokens())
    return np.asarray(outputs), grads


LAYER_SETS = [(), (0,), (3,), (1, 2), (0, 1, 2, 3)]


def test_scan_is_a_loop_and_collects_any_layers(params, looped):
    reference, _ = looped
    run = jax.jit(lambda params, x: [Stack().apply({"params": params}, x, s) for s in LAYER_SETS])
    for layers, (tokens, features) in zip(LAYER_SETS, run(params, _tokens()), strict=True):
        np.testing.assert_allclose(tokens, reference[-1], rtol=1e-5, atol=1e-6)
        if not layers:
            assert features is None
        else:
            np.testing.assert_allclose(features, reference[list(layers)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "fold"),
    [
        ((), False),
        ((("remat", "dots"),), False),
        ((("remat", "named"),), True),
        ((("remat", "full"), ("unroll", 3)), False),
    ],
)
def test_gradients_flow_through_collected_features(params, looped, options, fold):
    def loss(params, x):
        stack = Stack(options=options, fold=fold)
        tokens, features = stack.apply({"params": params}, x, (0, 2))
        return jnp.sum(WEIGHTS[:2] * features) + jnp.sum(WEIGHTS[2] * tokens)

    grads = jax.jit(jax.grad(loss, (0, 1)))(params, _tokens())
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(looped[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))


def _scans(jaxpr):
    """All scan equations of a jaxpr, inner ones included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _scans(inner)


def _forward_scan(layers, depth=DEPTH):
    stack = Stack(depth)
    x = _tokens()
    shapes = jax.eval_shape(stack.init, jax.random.key(0), x)
    jaxpr = jax.make_jaxpr(lambda p, x: stack.apply(p, x, layers))(shapes, x)
    (scan,) = _scans(jaxpr.jaxpr)
    return scan


def test_no_buffer_is_carried_when_no_layer_is_asked_for():
    assert _forward_scan(()).params["num_carry"] == 1
    assert _forward_scan((1,)).params["num_carry"] == 2


def test_program_does_not_grow_with_depth():
    sizes = {d: len(str(_forward_scan((0,), d).params["jaxpr"])) for d in (3, 12)}
    assert sizes[3] == sizes[12]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_backward_pass_keeps_one_buffer_not_one_for_each_layer(remat):
    stack = Stack(options=(("remat", remat),))
    x = _tokens()
    shapes = meta.unbox(jax.eval_shape(stack.init, jax.random.key(0), x))

    def loss(params, x):
        tokens, features = stack.apply(params, x, (1, 2))
        return jnp.sum(tokens) + jnp.sum(features**2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(shapes, x)
    outputs = [var.aval.shape for eqn in _scans(jaxpr.jaxpr) for var in eqn.outvars]
    assert (3, *x.shape) in outputs  # the buffer itself
    assert (DEPTH, 3, *x.shape) not in outputs


def test_rematerialisation_saves_less():
    def residuals(remat):
        stack = Stack(options=(("remat", remat),))
        x = _tokens()
        shapes = meta.unbox(jax.eval_shape(stack.init, jax.random.key(0), x))
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(stack.apply(p, x)[0])))(shapes)
        forward = next(_scans(jaxpr.jaxpr))
        return sum(int(np.prod(v.aval.shape)) for v in forward.outvars)

    sizes = {remat: residuals(remat) for remat in ("full", "dots", "named", "none")}
    assert sizes["full"] < sizes["dots"] < sizes["none"]
    assert sizes["named"] < sizes["none"]


def test_named_rematerialisation_keeps_what_is_dear_and_no_output_that_layer_scale_reads():
    x = _tokens()
    stack = Stack(options=(("remat", "named"),), fold=True)
    shapes = meta.unbox(jax.eval_shape(stack.init, jax.random.key(0), x))
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(stack.apply(p, x)[0])))(shapes)
    forward = next(_scans(jaxpr.jaxpr))
    carries = forward.params["num_carry"]
    kept = sorted(v.aval.shape for v in forward.outvars[carries:])
    rows = (DEPTH, *x.shape[:2])
    # The block's input, attention's output, the stream between halves, qkv, the MLP's hidden units.
    activations = [shape for shape in kept if shape[:3] == rows]
    assert activations == sorted([(*rows, WIDTH)] * 3 + [(*rows, 3 * WIDTH), (*rows, 24)])


def test_drop_path_needs_train_and_grows_with_depth():
    stack = Stack(options=(("drop_path_rate", 0.6),))
    x = _tokens(batch=256)
    params = meta.unbox(jax.jit(stack.init)(jax.random.key(0), x))

    @jax.jit
    def run(params, x):
        train = stack.apply(
            params, x, tuple(range(DEPTH)), train=True, rngs={"droppath": jax.random.key(3)}
        )
        return train[1], stack.apply(params, x)[0], Stack().apply(params, x)[0]

    features, evaluated, plain = run(params, x)
    np.testing.assert_array_equal(evaluated, plain)
    before = jnp.concatenate([x[None], features[:-1]])
    untouched = np.asarray(jnp.all(features == before, axis=(2, 3)).mean(axis=1))
    rates = np.linspace(0, 0.6, DEPTH)  # both branches dropped: rate squared
    np.testing.assert_allclose(untouched, rates**2, atol=0.08)
    assert untouched[0] == 0


def test_residual_outputs_start_smaller_with_depth():
    stack = Stack(depth=9)
    params = meta.unbox(jax.jit(stack.init)(jax.random.key(0), _tokens()))["params"]["blocks"]
    divisor = np.sqrt(2.0 * (np.arange(9) + 1))
    for kernel in (params["attn"]["proj"]["kernel"], params["mlp"]["fc2"]["kernel"]):
        std = np.asarray(kernel).reshape(9, -1).std(axis=1)
        np.testing.assert_allclose(std * divisor, 0.02, rtol=0.25)
        assert abs((std * divisor).mean() - 0.02) < 0.001
    std = np.asarray(params["mlp"]["fc1"]["kernel"]).reshape(9, -1).std(axis=1)
    np.testing.assert_allclose(std, 0.02, rtol=0.25)
    assert not np.array_equal(params["mlp"]["fc1"]["kernel"][0], params["mlp"]["fc1"]["kernel"][1])


def test_stacked_parameters_name_their_leading_axis():
    boxed = jax.eval_shape(Stack().init, jax.random.key(0), _tokens())["params"]["blocks"]
    assert boxed["attn"]["qkv"]["kernel"].names == ("layers", "embed", None, "heads", "head_dim")
    assert boxed["mlp"]["fc1"]["bias"].names == ("layers", "mlp")


def test_resolve_layers():
    assert resolve_layers((-2, -1), 5, "x") == (3, 4)
    assert resolve_layers((), 5, "x") == ()
    with pytest.raises(ConfigError, match=r"clip.layers=\(5,\).*0\.\.4"):
        resolve_layers((5,), 5, "clip.layers")
    with pytest.raises(ConfigError, match="ascending"):
        resolve_layers((-1, 3), 5, "x")
    with pytest.raises(ConfigError, match="ascending"):
        resolve_layers((4, -1), 5, "x")
