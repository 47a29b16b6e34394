"""Decoder properties: causality, cache, padding, window, stretched positions, fused maps."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import llm
from iv2_jax.models.layers import Precision
from iv2_jax.models.llm import Llm, LlmConfig
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.rope import RopeConfig, rotate, rotation
from tests.models import tiny_llm

DYNAMIC = RopeConfig(scaling="dynamic", factor=2.0, base_length=64)
VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 3},
    "fused_dynamic": {"fused_qkv": True, "rope": DYNAMIC},
    "linear": {"rope": RopeConfig(theta=500.0, scaling="linear", factor=4.0)},
    "all_heads": {"num_kv_heads": 4},
    "lora": {"lora": LoraConfig(2, 4.0), "lora_targets": ("q", "down")},
}


@partial(jax.jit, static_argnames=("config", "prefill", "return_layers", "train"))
def _apply(config, params, tokens=None, **kwargs):
    """One compiled call: op by op, the tests would take several times as long."""
    return Llm(config).apply({"params": params}, tokens, **kwargs)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_logits_are_uncached_ones_and_causal(name):
    config = tiny_llm.config(**VARIANTS[name])
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(2, 9)
    whole = _apply(config, params, tokens)

    changed = tokens.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % tiny_llm.VOCAB
    after = _apply(config, params, changed)
    np.testing.assert_array_equal(after.logits[:, :6], whole.logits[:, :6])
    assert np.abs(after.logits[:, 6] - whole.logits[:, 6]).max() > 1e-2

    cache = Llm(config).empty_cache(2, 11)
    parts = []
    for start, stop in ((0, 5), (5, 7), (7, 8), (8, 9)):
        out = _apply(config, params, tokens[:, start:stop], cache=cache, prefill=start == 0)
        cache = out.cache
        parts.append(out.logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole.logits, atol=2e-5)
    assert cache.length == 9
    np.testing.assert_array_equal(cache.positions, [[*range(9), -1, -1]] * 2)


def test_an_overfull_cache_is_not_wrong_tokens():
    config = tiny_llm.config()
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(1, 6)
    first = _apply(config, params, tokens, cache=Llm(config).empty_cache(1, 7), prefill=True)
    full = _apply(config, params, tokens[:, :1], cache=first.cache)
    over = _apply(config, params, tokens[:, :1], cache=full.cache)
    assert np.isfinite(full.logits).all()
    assert np.isnan(over.logits).all()


def test_reading_an_empty_cache_is_a_prefill():
    config = tiny_llm.config(sliding_window=3)
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(2, 6)
    cache = Llm(config).empty_cache(2, 8)
    read = _apply(config, params, tokens, cache=cache)
    filled = _apply(config, params, tokens, cache=cache, prefill=True)
    np.testing.assert_allclose(read.logits, filled.logits, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 3], ids=["whole", "window"])
def test_padding_changes_nothing(side, window):
    config = tiny_llm.config(sliding_window=window)
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(2, 7)
    pad = np.array([3, 0])
    padded, mask = np.zeros((2, 10), np.int32), np.zeros((2, 10), bool)
    rows = [np.arange(7 - p) + (3 + p if side == "left" else 0) for p in pad]
    for row, at in enumerate(rows):
        padded[row, at], mask[row, at] = tokens[row, : len(at)], True
    more = tiny_llm.tokens(2, 2, seed=5)
    cache = Llm(config).empty_cache(2, 12)
    uncached = _apply(config, params, padded, mask=mask)
    cached = _apply(config, params, padded, mask=mask, cache=cache, prefill=True)
    next_ = _apply(config, params, more, cache=cached.cache)
    assert np.isfinite(uncached.logits).all()
    for row, at in enumerate(rows):
        alone = np.concatenate([tokens[row, : len(at)], more[row]])[None]
        wanted = _apply(config, params, alone).logits[0]
        for got in (uncached, cached):
            np.testing.assert_allclose(got.logits[row, at], wanted[:-2], atol=2e-5)
        np.testing.assert_allclose(next_.logits[row], wanted[-2:], atol=2e-5)


def test_gradients_with_padding_are_finite_and_ignore_padding():
    config = tiny_llm.config(remat="full", scan_unroll=2)
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(2, 6)
    mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], bool)

    def loss(params, tokens, config):
        out = _apply(config, params, tokens, mask=mask)
        return jnp.sum(jnp.where(mask[..., None], out.logits, 0) ** 2)

    grad = jax.jit(jax.grad(loss), static_argnums=2)
    plain = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, remat="none"))
    a, b = grad(params, tokens, config), grad(params, np.where(mask, tokens, 7), plain)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4), a, b)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(a))


def test_packed_rows_are_separate_rows():
    config = tiny_llm.config()
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(1, 8)
    segment = np.array([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4]])
    mask = segment[:, :, None] == segment[:, None, :]
    packed = _apply(config, params, tokens, mask=mask, positions=positions).logits
    first = _apply(config, params, tokens[:, :3]).logits
    second = _apply(config, params, tokens[:, 3:]).logits
    np.testing.assert_allclose(packed, np.concatenate([first, second], axis=1), atol=2e-5)


def test_window_hides_what_is_far():
    config = tiny_llm.config(sliding_window=3, depth=1)
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(1, 7)
    changed = tokens.copy()
    changed[0, 2] = (changed[0, 2] + 1) % tiny_llm.VOCAB
    a, b = (_apply(config, params, t).logits[0] for t in (tokens, changed))
    differs = np.abs(a - b).max(axis=-1) > 1e-4
    np.testing.assert_array_equal(differs, [0, 0, 1, 1, 1, 0, 0])


def test_fused_map_is_the_three_maps():
    separate, fused = tiny_llm.config(), tiny_llm.config(fused_qkv=True)
    params = tiny_llm.params(separate)
    attn = dict(params["decoder"]["blocks"]["attn"])
    q, k, v = (attn.pop(name)["kernel"] for name in "qkv")
    q = q.reshape(*q.shape[:2], 2, 2, q.shape[-1])  # (layers, width, groups, heads of a group, d)
    qkv = np.concatenate([q, k[:, :, :, None], v[:, :, :, None]], axis=3)
    blocks = params["decoder"]["blocks"] | {"attn": attn | {"qkv": {"kernel": qkv}}}
    joined = params | {"decoder": params["decoder"] | {"blocks": blocks}}
    tokens = tiny_llm.tokens(2, 5)
    np.testing.assert_allclose(
        _apply(fused, joined, tokens).logits, _apply(separate, params, tokens).logits, atol=1e-5
    )


def test_rotation_is_relative_and_its_own_inverse():
    positions = np.array([[3, 10]])
    cos, sin = rotation(positions, 8, RopeConfig())
    x = np.random.default_rng(0).normal(size=(2, 1, 2, 3, 8)).astype(np.float32)
    q, k = (rotate(part, cos, sin) for part in x)
    np.testing.assert_allclose(rotate(q, cos, -sin), x[0], atol=1e-5)
    far = rotation(positions + 100, 8, RopeConfig())
    q_far, k_far = (rotate(part, *far) for part in x)
    np.testing.assert_allclose(
        jnp.sum(q[:, 0] * k[:, 1], -1), jnp.sum(q_far[:, 0] * k_far[:, 1], -1), atol=2e-4
    )


def test_dynamic_scaling_follows_the_length():
    """theta * (f s / L0 - (f - 1))^(d / (d - 2)) beyond the base length (spec stage 3, 6.2)."""
    config = RopeConfig(theta=100.0, scaling="dynamic", factor=2.5, base_length=8)
    positions = np.array([np.arange(8), np.arange(8) + 16])
    cos, sin = rotation(positions, 6, config)
    for row, length in ((0, 8), (1, 24)):
        theta = 100.0 * (2.5 * length / 8 - 1.5) ** (6 / 4)
        angles = positions[row][:, None] * theta ** (-np.arange(0, 6, 2) / 6)
        np.testing.assert_allclose(cos[row, :, 0], np.cos(angles), atol=1e-5)
        np.testing.assert_allclose(sin[row, :, 0], np.sin(angles), atol=1e-5)
    plain = rotation(positions, 6, RopeConfig(theta=100.0))
    np.testing.assert_allclose(cos[0], plain[0][0], atol=1e-6)
    linear = rotation(positions, 6, RopeConfig(theta=100.0, scaling="linear", factor=4.0))
    np.testing.assert_allclose(linear[1], rotation(positions / 4, 6, RopeConfig(100.0))[1])


def test_tied_head_is_the_embedding():
    config = tiny_llm.config(tied_head=True)
    params = tiny_llm.params(config)
    assert params.keys() == {"embed", "decoder"}
    out = _apply(config, params, tiny_llm.tokens(1, 4))
    np.testing.assert_allclose(
        out.logits, out.hidden @ params["embed"]["embedding"].T, rtol=1e-5, atol=1e-5
    )


def test_embeddings_in_the_place_of_tokens_and_collected_layers():
    config = tiny_llm.config()
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(2, 4)
    embeddings = Llm(config).apply({"params": params}, tokens, method="embed_tokens")
    a = _apply(config, params, tokens, return_layers=(0, -1))
    b = _apply(config, params, embeddings=embeddings, return_layers=(-2,))
    np.testing.assert_array_equal(a.logits, b.logits)
    np.testing.assert_array_equal(a.features[:1], b.features)
    assert a.features.shape == (2, 2, 4, 16)
    scale = params["decoder"]["norm"]["scale"]
    last = np.asarray(a.features[1])
    normed = last / np.sqrt((last**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(a.hidden, normed, atol=1e-5)


def test_an_id_out_of_range_is_not_another_token():
    config = tiny_llm.config()
    params = {"params": tiny_llm.params(config)}
    rows = Llm(config).apply(params, np.array([[1, tiny_llm.VOCAB]]), method="embed_tokens")
    np.testing.assert_array_equal(rows[0, 0], params["params"]["embed"]["embedding"][1])
    assert np.isnan(rows[0, 1]).all()


def test_every_parameter_has_axis_names():
    config = tiny_llm.config().with_lora(LoraConfig(2, 4.0), head=True)
    boxed = jax.eval_shape(Llm(config).init, jax.random.key(0), np.zeros((1, 2), np.int32))
    blocks = boxed["params"]["decoder"]["blocks"]
    assert blocks["attn"]["q"]["kernel"].names == ("layers", "embed", "heads", "head_dim")
    assert blocks["attn"]["o"]["lora_b"].names == ("layers", "rank", "embed")
    assert blocks["mlp"]["down"]["lora_a"].names == ("layers", "mlp", "rank")
    assert boxed["params"]["head"]["kernel"].names == ("embed", "vocab")
    assert boxed["params"]["embed"]["embedding"].names == ("vocab", "embed")
    leaves = jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
    assert all(len(leaf.names) == len(leaf.value.shape) for leaf in leaves)


def test_adapters_dropout_runs_in_training_only():
    config = tiny_llm.config().with_lora(LoraConfig(2, 4.0, dropout=0.5), head=True)
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(1, 4)
    quiet = _apply(config, params, tokens).logits
    first, second = (
        _apply(config, params, tokens, train=True, rngs={"dropout": jax.random.key(i)}).logits
        for i in range(2)
    )
    assert np.abs(first - second).max() > 1e-2
    assert np.abs(first - quiet).max() > 1e-2


def test_bfloat16_is_near_float32():
    config = tiny_llm.config()
    low = tiny_llm.config(precision=Precision("bfloat16", "bfloat16"))
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(2, 6)
    wide = _apply(config, params, tokens).logits
    narrow = _apply(low, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), tokens)
    assert narrow.logits.dtype == jnp.float32
    assert Llm(low).empty_cache(1, 2).keys.dtype == jnp.bfloat16
    assert np.abs(narrow.logits - wide).max() < 0.06 * np.abs(wide).max()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3 must divide num_heads=4"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"width": 18, "head_dim": None}, "width=18 is no multiple of num_heads=4"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"depth": 0}, "depth=0"),
        ({"lora": LoraConfig(2, 4.0), "lora_targets": ("downn",)}, "did you mean 'down'"),
        ({"lora": LoraConfig(2, 4.0), "lora_targets": ("qkv",)}, "no map 'qkv'"),
        ({"lora_targets": ("q",)}, "needs lora to be set"),
    ],
)
def test_decoder_config_names_the_field(overrides, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny_llm.DECODER, **overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scaling": "ntk"}, "rope.scaling='ntk'"),
        ({"scaling": "dynamic", "factor": 2.0}, "rope.base_length must be given"),
        ({"scaling": "linear", "factor": 0.5}, "rope.factor=0.5"),
        ({"theta": 0.0}, "rope.theta=0.0"),
    ],
)
def test_rope_config_names_the_field(overrides, message):
    with pytest.raises(ConfigError, match=message):
        RopeConfig(**overrides)


def test_llm_config_names_the_field():
    with pytest.raises(ConfigError, match="lora_head=True needs decoder"):
        LlmConfig(8, tiny_llm.DECODER, lora_head=True)
    decoder = dataclasses.replace(tiny_llm.DECODER, lora=LoraConfig(2, 4.0))
    with pytest.raises(ConfigError, match="tied_head=False"):
        LlmConfig(8, decoder, tied_head=True, lora_head=True)
    with pytest.raises(ConfigError, match="vocab_size=1"):
        LlmConfig(1, decoder)


def test_misfits_are_refused():
    config = tiny_llm.config()
    params, tokens = tiny_llm.params(config), tiny_llm.tokens(2, 4)
    with pytest.raises(ValueError, match="either tokens or embeddings"):
        _apply(config, params)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\)"):
        _apply(config, params, tokens, mask=np.ones((2, 3), bool))
    with pytest.raises(ValueError, match="4 tokens do not fit a cache of 3 slots"):
        _apply(config, params, tokens, cache=Llm(config).empty_cache(2, 3))
    with pytest.raises(ConfigError, match="return_layers"):
        _apply(config, params, tokens, return_layers=(2,))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mistral_7b", 7_248_023_552),
        ("mistral_7b_lora", 7_248_023_552 + 42_532_864),
        ("internlm2_5_7b", 7_737_708_544),
        ("vicuna_7b", 6_738_415_616),
    ],
)
def test_named_sizes_have_the_known_parameter_counts(name, count):
    init = Llm(llm.ZOO[name]).init
    abstract = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 2), np.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == count
