"""The kernel for short sequences: against plain XLA in interpret mode, and compiled for TPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import attention_bytes
from iv2_jax.kernels import short_plan, short_tpu
from iv2_jax.models.attention import dot_product_attention
from iv2_jax.parallel.plan import traced


def _inputs(batch, queries, keys, heads, groups, head_dim):
    rng = np.random.default_rng(head_dim)
    q = rng.normal(size=(batch, queries, heads, head_dim))
    k, v = rng.normal(size=(2, batch, keys, groups, head_dim))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def _run(inputs, backend, **shown):
    """Output and the gradients of a loss that weighs every output differently."""

    def loss(q, k, v):
        out = dot_product_attention(q, k, v, **shown, backend=backend)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return out, *grads


def _agree(inputs, **shown):
    """To 1e-5, float32."""
    plain, kernel = (_run(inputs, b, **shown) for b in ("xla", "short_interpret"))
    for a, b in zip(plain, kernel, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    return plain, kernel


def _agree_in_halves(inputs):
    """Of bfloat16 inputs, to 1e-2 of the largest element of what float32 gives."""
    halves = tuple(x.astype(jnp.bfloat16) for x in inputs)
    exact = _run(tuple(x.astype(jnp.float32) for x in halves), "xla")
    for a, b in zip(exact, _run(halves, "short_interpret"), strict=True):
        assert b.dtype == jnp.bfloat16
        np.testing.assert_allclose(a, b.astype(jnp.float32), atol=1e-2 * max(1, np.abs(a).max()))


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups", "head_dim"),
    [
        (417, 417, 2, 2, 88),
        (206, 206, 2, 1, 200),
        pytest.param(257, 257, 3, 3, 128, marks=pytest.mark.slow),
        (1, 1, 2, 2, 64),
        (7, 300, 4, 2, 24),
        pytest.param(1024, 1024, 1, 1, 88, marks=pytest.mark.slow),
    ],
)
def test_forward_and_gradient_agree_with_plain(queries, keys, heads, groups, head_dim):
    inputs = _inputs(1, queries, keys, heads, groups, head_dim)
    _agree(inputs)
    if queries in (1, 417, 1024):
        _agree_in_halves(inputs)


def test_packed_rows_with_hidden_tokens_and_shared_keys():
    """Rows of queries in three tiles, each with the keys that a causal mask leaves it."""
    segments = np.repeat([[1, 2, 0], [1, 1, 2]], [300, 200, 40], axis=1)
    mask = np.random.default_rng(0).random((2, 1, 1, 540)) < 0.8
    inputs = _inputs(2, 540, 540, 2, 1, 16)
    _agree(inputs, causal=True, mask=jnp.asarray(mask), segments=jnp.asarray(segments))


def test_hidden_keys_and_a_sample_without_any():
    mask = np.random.default_rng(0).random((2, 1, 1, 40)) < 0.6
    mask[1] = False
    _, (out, *grads) = _agree(_inputs(2, 20, 40, 2, 2, 24), mask=jnp.asarray(mask))
    for x in (out, *grads):
        np.testing.assert_array_equal(x[1], np.zeros_like(x[1]))


@pytest.mark.parametrize("causal", [False, True])
def test_many_tiles_are_a_loop(monkeypatch, causal):
    """Four tiles of eight rows, and eleven rows: three are too few for a tile of their own."""
    monkeypatch.setattr(short_plan, "_QUERY_ROWS", (8,))
    monkeypatch.setattr(short_plan, "_SCORES_AT_ONCE", 0)
    monkeypatch.setattr(short_plan, "LEAST_ROWS", 4)
    monkeypatch.setattr(short_plan, "LANES", 8)
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [20, 15, 8], axis=1))
    _agree(_inputs(1, 43, 43, 2, 1, 12), causal=causal, segments=segments if causal else None)


def test_heads_in_front_where_a_block_of_all_does_not_fit(monkeypatch):
    monkeypatch.setattr(short_plan, "_group_counts", lambda groups, *_: [groups // 2])
    inputs = _inputs(1, 130, 140, 4, 2, 24)
    plain = _run(inputs, "xla")
    monkeypatch.setattr(short_plan, "_need", lambda *a: 0 if not a[6] else 1 << 40)
    for a, b in zip(plain, _run(inputs, "short_interpret"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_splits_over_a_mesh_without_moving_rows():
    """Two devices for samples, two for heads; three samples do not divide and stay whole."""
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 1, 2), ("data", "fsdp", "tensor"))
    for batch in (2, 3):
        inputs = _inputs(batch, 16, 16, 2, 2, 8)
        mask = jnp.asarray(np.arange(16) < 11)[None, None, None]
        expected = _run(inputs, "xla", mask=mask)
        with jax.set_mesh(mesh):
            rows = PartitionSpec("data" if batch == 2 else None)
            put = jax.device_put(inputs, NamedSharding(mesh, rows))
            got = _run(put, "short_interpret", mask=mask)
        for a, b in zip(expected, got, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "heads", "mib", "expected"),
    [
        (417, 88, 16, 64, (16, True, 417, 2)),  # 8 x 88 is no multiple of 128: all heads
        (417, 88, 16, 16, (16, True, 256, 1)),
        (417, 128, 25, 64, (5, True, 417, 2)),
        (1024, 88, 16, 128, (16, True, 256, 2)),
        (2049, 88, 16, 64, (16, True, 128, 1)),
        (2049, 200, 16, 64, (2, False, 256, 2)),
        (4097, 88, 16, 128, (16, True, 128, 1)),
        (4097, 88, 16, 64, (1, False, 256, 2)),
    ],
)
def test_cut_by_memory(tokens, head_dim, heads, mib, expected):
    steps = short_plan.plan(
        tokens, tokens, heads, heads, head_dim, itemsize=2, causal=False, vmem=mib << 20
    )
    assert (steps.heads, steps.folded, steps.rows, steps.buffers) == expected
    assert steps.vmem <= 0.9 * (mib << 20)


def test_what_fits_no_memory_is_said():
    wide = jax.ShapeDtypeStruct((1, 1024, 1, 4096), jnp.float32)
    with pytest.raises(ValueError, match="a head does not fit 16 MiB"):
        dot_product_attention(wide, wide, wide, backend="short")


def test_flops_are_those_of_the_scores():
    """Two products forward, five backward; a causal mask leaves out tiles that nobody sees."""
    q = jax.ShapeDtypeStruct((3, 512, 2, 64), jnp.bfloat16)

    def asked(causal):
        def loss(q, k, v):
            out = dot_product_attention(q, k, v, causal=causal, backend="short_interpret")
            return jnp.sum(out)

        return traced.count(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, q, q)).kernels

    one = 2 * 3 * 2 * 512 * 512 * 64
    assert asked(False) == {short_tpu.FORWARD: 2 * one, short_tpu.BACKWARD: 5 * one}
    assert asked(True) == {short_tpu.FORWARD: 1.5 * one, short_tpu.BACKWARD: 3.75 * one}


@pytest.mark.tpu
def test_bytes_of_masked_clips_on_v5p():
    """Goal P8: at most 1 GB forward and backward, where plain XLA moves three times as much."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'iv2_jax[tpu]'")
    case = attention_bytes.compile_case("v5p", "417x16x88", "short", clips=32)
    assert sorted(case["kernels"]) == [short_tpu.BACKWARD, short_tpu.FORWARD]
    assert case["gb"] < 1.05 * case["least_gb"] < 0.5
    assert case["temporary_gb"] < 0.01
