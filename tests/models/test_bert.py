"""BERT: masks, modes, dropout, stacked parameters and errors; the layers' query mode."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models.layers import Precision
from iv2_jax.models.text.bert import ZOO, Bert, BertConfig
from iv2_jax.models.text.bert_layers import (
    Embeddings,
    Layer,
    LayerConfig,
    cross_attention_bias,
    self_attention_bias,
)

CONFIG = ZOO["test_tiny_bert"]
RNG = np.random.default_rng(0)
IDS = RNG.integers(5, CONFIG.vocab_size, (2, 6))
CONTEXT = RNG.normal(size=(2, 4, CONFIG.context_width)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    """Parameters that are far from their start: biases and cross-attention matter."""
    variables = meta.unbox(jax.jit(Bert(CONFIG).init)(jax.random.key(0), IDS, None, CONTEXT))
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(1)
    return tree.unflatten([x + 0.2 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves])


def _apply(params, *args, config=CONFIG, rngs=None, **static):
    """Runs the model as one program: op by op these tests would take minutes."""
    return _jitted(config, tuple(sorted(static.items())))(params, args, rngs)


@functools.cache
def _jitted(config, static):
    return jax.jit(
        lambda params, args, rngs: Bert(config).apply(params, *args, rngs=rngs, **dict(static))
    )


def test_stacks_have_one_slice_a_layer_and_every_axis_has_a_name():
    shapes = jax.eval_shape(Bert(CONFIG).init, jax.random.key(0), IDS, None, CONTEXT)["params"]
    assert set(shapes) == {"embeddings", "text_layers", "fusion_layers", "head"}
    boxed = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in boxed)
    for name, depth in (("text_layers", 2), ("fusion_layers", 1)):
        kernel = shapes[name]["attn"]["q"]["kernel"]
        assert kernel.names == ("layers", "embed", "heads", "head_dim")
        assert kernel.value.shape == (depth, 32, 2, 16)
    assert "cross_attn" not in shapes["text_layers"]
    assert shapes["fusion_layers"]["cross_attn"]["k"]["kernel"].value.shape == (1, 24, 2, 16)


def test_a_call_is_text_then_fusion(params):
    mask = np.array([[1] * 6, [1] * 3 + [0] * 3])
    hidden = _apply(params, IDS, mask, method="encode_text")
    fused = _apply(params, hidden, mask, CONTEXT, method="fuse")
    np.testing.assert_array_equal(fused, _apply(params, IDS, mask, CONTEXT))
    assert np.abs(fused - hidden).max() > 0.1


def test_padding_is_never_read(params):
    mask = np.array([[1] * 6, [1] * 3 + [0] * 3])
    changed = IDS.copy()
    changed[1, 3:] = 7
    for method, extra in (("encode_text", ()), ("__call__", (CONTEXT,))):
        first = _apply(params, IDS, mask, *extra, method=method)
        second = _apply(params, changed, mask, *extra, method=method)
        np.testing.assert_array_equal(first[1, :3], second[1, :3])
        np.testing.assert_array_equal(first[0], second[0])


def test_a_padded_text_is_the_short_text(params):
    mask = np.array([[1] * 6, [1] * 3 + [0] * 3])
    long = _apply(params, IDS, mask, CONTEXT)[1, :3]
    short = _apply(params, IDS[1:, :3], None, CONTEXT[1:])[0]
    np.testing.assert_allclose(long, short, atol=2e-6)


def test_masked_context_is_never_read(params):
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    changed = CONTEXT.copy()
    changed[1, 2:] = 100.0
    first = _apply(params, IDS, None, CONTEXT, mask)
    np.testing.assert_array_equal(first, _apply(params, IDS, None, changed, mask))
    alone = _apply(params, IDS[1:], None, CONTEXT[1:, :2])
    np.testing.assert_allclose(first[1:], alone, atol=2e-6)


def test_nothing_is_causal(params):
    changed = IDS.copy()
    changed[:, -1] = (changed[:, -1] + 1) % CONFIG.vocab_size
    first, second = (_apply(params, ids, method="encode_text") for ids in (IDS, changed))
    assert np.abs(first - second)[:, 0].max() > 1e-4


def test_a_text_of_nothing_but_padding_is_finite(params):
    @jax.jit
    @jax.value_and_grad
    def run(params):
        return jnp.sum(_apply(params, IDS, jnp.zeros((2, 6)), CONTEXT, jnp.zeros((2, 4))) ** 2)

    out, grads = run(params)
    assert np.isfinite(out)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_returned_layers(params):
    hidden, features = _apply(params, IDS, return_layers=(0, -1), method="encode_text")
    assert features.shape == (2, *hidden.shape)
    np.testing.assert_array_equal(features[-1], hidden)
    shallow = dataclasses.replace(CONFIG, fusion_layer=1)
    first = {
        k: jax.tree.map(lambda x: x[:1], v) if "text" in k else v
        for k, v in params["params"].items()
    }
    alone = _apply({"params": first}, IDS, config=shallow, method="encode_text")
    np.testing.assert_allclose(features[0], alone, atol=1e-6)


def test_dropout_is_drawn_anew_in_each_layer_and_only_in_training(params):
    plain = _apply(params, IDS, None, CONTEXT)
    rngs = {"dropout": jax.random.key(1)}
    noisy = _apply(params, IDS, None, CONTEXT, train=True, rngs=rngs)
    again = _apply(params, IDS, None, CONTEXT, train=True, rngs=rngs)
    np.testing.assert_array_equal(noisy, again)
    assert np.abs(noisy - plain).max() > 1e-2
    np.testing.assert_array_equal(plain, _apply(params, IDS, None, CONTEXT, rngs=rngs))

    # Layers of equal parameters that drop half of everything: equal draws would give one pattern.
    config = dataclasses.replace(CONFIG, depth=2, fusion_layer=2, dropout_rate=0.5)
    zeros = {k: v for k, v in params["params"].items() if k in ("embeddings", "text_layers")}
    layers = jax.tree.map(jnp.zeros_like, zeros["text_layers"])
    # Only the feed-forward's output bias is left, so each layer adds 1 / 0.5 or nothing.
    layers["mlp"]["fc2"]["bias"] = jnp.ones_like(layers["mlp"]["fc2"]["bias"])
    layers["mlp"]["norm"]["scale"] = jnp.ones_like(layers["mlp"]["norm"]["scale"])
    _, features = _apply(
        {"params": {"embeddings": zeros["embeddings"], "text_layers": layers}},
        IDS,
        config=dataclasses.replace(config, mlm_head=False),
        return_layers=(0, 1),
        train=True,
        rngs=rngs,
        method="encode_text",
    )
    dropped = np.asarray(features) > 0
    assert 0.2 < (dropped[0] != dropped[1]).mean() < 0.8


@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate"])
def test_each_dropout_acts(params, rate):
    config = dataclasses.replace(CONFIG, dropout_rate=0.0, attention_dropout_rate=0.0)
    rngs = {"dropout": jax.random.key(3)}
    plain = _apply(params, IDS, None, CONTEXT, config=config, train=True, rngs=rngs)
    np.testing.assert_array_equal(plain, _apply(params, IDS, None, CONTEXT))
    config = dataclasses.replace(config, **{rate: 0.5})
    noisy = _apply(params, IDS, None, CONTEXT, config=config, train=True, rngs=rngs)
    assert np.abs(noisy - plain).max() > 1e-2


@pytest.mark.parametrize("options", [{"remat": "full"}, {"remat": "dots", "scan_unroll": 2}])
def test_remat_and_unroll_change_nothing(params, options):
    config = dataclasses.replace(CONFIG, **options)

    ours, grads = _loss_and_grads(config)(params)
    plain, plain_grads = _loss_and_grads(CONFIG)(params)
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 + 1e-5 * np.abs(b).max()),
        grads,
        plain_grads,
    )


@functools.cache
def _loss_and_grads(config):
    def loss(params):
        return jnp.sum(Bert(config).apply(params, IDS, None, CONTEXT) ** 3)

    return jax.jit(jax.value_and_grad(loss))


def test_head_is_tied_to_the_word_table(params):
    hidden = RNG.normal(size=(3, CONFIG.width)).astype(np.float32)
    logits = _apply(params, hidden, method="mlm_logits")
    assert logits.shape == (3, CONFIG.vocab_size)
    assert logits.dtype == jnp.float32
    changed = jax.tree.map(lambda x: x, params)
    changed["params"]["embeddings"]["word"] = params["params"]["embeddings"]["word"].at[9].add(1.0)
    moved = np.abs(_apply(changed, hidden, method="mlm_logits") - logits).max(axis=0) > 1e-3
    assert moved[9]
    assert moved.sum() == 1


def test_bfloat16_is_near_float32_and_keeps_float32_logits(params):
    config = dataclasses.replace(CONFIG, precision=Precision(compute_dtype="bfloat16"))
    ours = _apply(params, IDS, None, CONTEXT, config=config)
    assert ours.dtype == jnp.bfloat16
    reference = _apply(params, IDS, None, CONTEXT)
    assert np.abs(ours - reference).max() < 3e-2 * np.abs(reference).max()
    assert _apply(params, ours, config=config, method="mlm_logits").dtype == jnp.float32


def test_an_id_outside_the_vocabulary_is_not_another_word(params):
    out = _apply(params, np.array([[1, CONFIG.vocab_size]]), method="encode_text")
    assert np.isnan(out).any()


def test_mask_scores():
    mask = jnp.array([[1, 0]])
    np.testing.assert_array_equal(self_attention_bias(mask)[:, 0, 0], [[0.0, -10000.0]])
    bias = cross_attention_bias(mask)
    np.testing.assert_array_equal(bias[:, 0, 0], [[0.0, np.finfo(np.float32).min]])
    assert self_attention_bias(None) is None
    assert cross_attention_bias(None) is None


LAYER = LayerConfig(width=16, num_heads=2, mlp_width=20, context_width=12)


def test_query_layer_splits_queries_from_text():
    """Only queries cross-attend and have their own feed-forward (spec stage3 2.2)."""
    layer = Layer(LAYER, cross_attention=True, query_mlp=True)
    x = RNG.normal(size=(2, 7, 16)).astype(np.float32)
    context = RNG.normal(size=(2, 5, 12)).astype(np.float32)
    variables = meta.unbox(layer.init(jax.random.key(0), x, None, context, num_queries=4))
    apply = jax.jit(functools.partial(layer.apply, num_queries=4))
    out = apply(variables, x, None, context)
    parts = variables["params"]
    other_context = apply(variables, x, None, context + 1)
    np.testing.assert_array_equal(out[:, 4:], other_context[:, 4:])
    assert np.abs(out[:, :4] - other_context[:, :4]).max() > 1e-5

    doubled = jax.tree.map(lambda x: x, variables)
    doubled["params"]["mlp_query"] = jax.tree.map(lambda x: 2 * x, parts["mlp_query"])
    changed = apply(doubled, x, None, context)
    np.testing.assert_array_equal(out[:, 4:], changed[:, 4:])
    assert np.abs(out[:, :4] - changed[:, :4]).max() > 1e-2


def test_query_layer_keeps_the_texts_parameters_without_text():
    layer = Layer(LAYER, query_mlp=True)
    x = RNG.normal(size=(2, 4, 16)).astype(np.float32)
    variables = meta.unbox(layer.init(jax.random.key(0), x, num_queries=4))
    assert set(variables["params"]) == {"attn", "mlp", "mlp_query"}
    assert layer.apply(variables, x, num_queries=4).shape == x.shape


def test_embeddings_put_queries_first_without_position():
    module = Embeddings(LAYER, vocab_size=11, max_length=6, token_types=0)
    queries = RNG.normal(size=(1, 3, 16)).astype(np.float32)
    ids = np.array([[4, 5]])
    variables = meta.unbox(module.init(jax.random.key(0), ids, queries))
    assert set(variables["params"]) == {"word", "position", "norm"}
    both = module.apply(variables, ids, queries)
    np.testing.assert_array_equal(both[:, :3], module.apply(variables, None, queries))
    np.testing.assert_array_equal(both[:, 3:], module.apply(variables, ids))
    with pytest.raises(ConfigError, match="token ids, queries or both"):
        module.apply(variables, None)


def test_drop_path_drops_whole_branches():
    layer = Layer(LAYER)
    x = RNG.normal(size=(64, 3, 16)).astype(np.float32)
    variables = meta.unbox(layer.init(jax.random.key(0), x))
    rngs = {"droppath": jax.random.key(1)}
    out = layer.apply(variables, x, drop_path=0.9, rngs=rngs)

    def norm(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True))

    untouched = np.abs(out - norm(norm(x))).max(axis=(1, 2)) < 1e-5
    assert 0.6 < untouched.mean() < 0.95  # 0.9 ** 2 for two branches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "num_heads": 4}, "width=30 is not a multiple of num_heads=4"),
        ({"fusion_layer": 25}, "fusion_layer=25 is more than depth=24"),
        ({"fusion_layer": 0}, "fusion_layer=0"),
        ({"vocab_size": 1.5}, "vocab_size=1.5"),
        ({"context_width": True}, "context_width=True"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0"),
        ({"attention_dropout_rate": -0.1}, "attention_dropout_rate=-0.1"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"remat": "all"}, "remat='all'"),
    ],
)
def test_config_errors_name_the_field(options, message):
    with pytest.raises(ConfigError, match=message):
        BertConfig(**options)


def test_call_errors(params):
    with pytest.raises(ConfigError, match="17 tokens is longer than max_length=16"):
        _apply(params, np.ones((1, 17), int), method="encode_text")
    with pytest.raises(ConfigError, match="need a context"):
        _apply(params, IDS)
    with pytest.raises(ConfigError, match="context_width=24"):
        _apply(params, IDS, None, CONTEXT[..., :5])
    with pytest.raises(ConfigError, match="return_layers"):
        _apply(params, IDS, return_layers=(2,), method="encode_text")
    no_fusion = dataclasses.replace(CONFIG, fusion_layer=CONFIG.depth, mlm_head=False)
    variables = jax.jit(Bert(no_fusion).init)(jax.random.key(0), IDS)
    with pytest.raises(ConfigError, match="no fusion layers"):
        _apply(variables, CONTEXT, None, CONTEXT, config=no_fusion, method="fuse")
    with pytest.raises(ConfigError, match="no masked-LM head"):
        _apply(variables, np.zeros((1, 32)), config=no_fusion, method="mlm_logits")
    with pytest.raises(ConfigError, match="needs context tokens"):
        Layer(LAYER, cross_attention=True).init(jax.random.key(0), np.zeros((1, 2, 16)))
