"""The Pallas TPU kernel: against plain XLA in interpret mode, and compiled for a v5e chip."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from iv2_jax.kernels import flash_tpu
from iv2_jax.kernels.choice import prefer_backend
from iv2_jax.models import zoo
from iv2_jax.models.attention import dot_product_attention
from iv2_jax.models.video_encoder import VideoEncoder
from iv2_jax.parallel import described


def _inputs(batch, queries, keys, heads, groups, head_dim):
    rng = np.random.default_rng(head_dim)
    q = rng.normal(size=(batch, queries, heads, head_dim))
    k, v = rng.normal(size=(2, batch, keys, groups, head_dim))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


def _run(inputs, backend, mask=None, causal=False, segments=None):
    """Output and the gradients of a loss that weighs every output differently."""

    def loss(q, k, v):
        shown = {"mask": mask, "causal": causal, "segments": segments}
        out = dot_product_attention(q, k, v, **shown, backend=backend)
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return out, *grads


def _agree(inputs, **kwargs):
    plain, kernel = (_run(inputs, b, **kwargs) for b in ("xla", "pallas_interpret"))
    for a, b in zip(plain, kernel, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    return kernel


@pytest.mark.parametrize(
    ("head_dim", "queries", "keys", "groups"),
    [(88, 140, 150, 2), (200, 128, 130, 1), (64, 7, 128, 2)],
    ids=["1b_heads", "6b_shared_keys", "no_padded_keys"],
)
def test_forward_and_gradient_agree_with_plain(head_dim, queries, keys, groups):
    _agree(_inputs(2, queries, keys, 2, groups, head_dim))


def test_causal_with_padding():
    _agree(_inputs(1, 140, 140, 2, 1, 88), causal=True)


def test_packed_samples_do_not_see_each_other():
    segments = np.repeat([[1, 2, 0], [1, 1, 2]], [60, 50, 30], axis=1)
    _agree(_inputs(2, 140, 140, 2, 1, 32), causal=True, segments=jnp.asarray(segments))


@pytest.mark.parametrize("causal", [False, True])
def test_hidden_keys_and_a_sample_without_any(causal):
    inputs = _inputs(2, 20, 20, 2, 2, 24)
    mask = np.random.default_rng(0).random((2, 1, 1, 20)) < 0.6
    mask[0, ..., 0], mask[1] = False, False  # with causal, query 0 of sample 0 is empty as well
    out, *_ = _agree(inputs, mask=jnp.asarray(mask), causal=causal)
    np.testing.assert_array_equal(out[1], np.zeros_like(out[1]))


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 128), (512, 512), (2049, 384), (417, 512), (1025, 384)]
)
def test_blocks_waste_at_most_a_tenth(length, expected):
    block = flash_tpu.block_size(length)
    assert block == expected
    assert -(-length // block) * block <= 1.1 * -(-length // 128) * 128


def test_splits_over_a_mesh_without_moving_rows():
    """Two devices for samples, two for heads; three samples do not divide and stay whole."""
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 1, 2), ("data", "fsdp", "tensor"))
    for batch in (2, 3):
        inputs = _inputs(batch, 16, 16, 2, 2, 8)
        expected = _run(inputs, "xla")
        with jax.set_mesh(mesh):
            rows = PartitionSpec("data" if batch == 2 else None)
            put = jax.device_put(inputs, NamedSharding(mesh, rows))
            got = _run(put, "pallas_interpret")
        for a, b in zip(expected, got, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_an_encoder_trains_through_the_kernel():
    """Within the scan over blocks, with rematerialisation: same output, same gradients."""
    config = dataclasses.replace(zoo.get("test_tiny"), remat="full")
    model = VideoEncoder(config)
    size = config.image_size
    video = np.random.default_rng(0).normal(size=(2, config.num_frames, size, size, 3))
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), video)["params"])

    def loss(params):
        out = model.apply({"params": params}, video)
        return jnp.mean(jnp.square(out.pooled)) + jnp.mean(jnp.square(out.tokens))

    results = []
    for backend in ("xla", "pallas_interpret"):
        with prefer_backend(backend):
            results.append(jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(params)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.fixture(scope="module")
def v5e():
    """Devices of a v5e slice of four, to compile for; none is needed."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'iv2_jax[tpu]'")
    return np.asarray(described.topology("v5e:2x2").devices())


def _compile(shape, sharding):
    """Compiles forward and backward; the text of the program."""

    def loss(q, k, v):
        return jnp.sum(dot_product_attention(q, k, v, backend="pallas").astype(jnp.float32))

    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    with jax.default_matmul_precision("default"):
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(2049, 16, 88), (1025, 25, 128), (1025, 16, 200)]
)
def test_compiles_for_v5e(v5e, tokens, heads, head_dim):
    shape = (2, tokens, heads, head_dim)
    compiled = _compile(shape, SingleDeviceSharding(v5e[0]))
    # Forward, and backward for queries and for keys and values: three kernels, no scores.
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    scores = 4 * shape[0] * heads * tokens * tokens
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.tpu
def test_compiles_for_a_v5e_mesh(v5e):
    mesh = Mesh(v5e.reshape(2, 1, 2), ("data", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        spec = PartitionSpec(("data", "fsdp"), None, "tensor")
        compiled = _compile((4, 2049, 16, 88), NamedSharding(mesh, spec))
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "all-gather" not in text
