from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.kernels import choice
from iv2_jax.kernels.choice import choose_backend, prefer_backend
from iv2_jax.models.attention import dot_product_attention


def _qk(queries=2049, keys=2049, head_dim=88, dtype=jnp.bfloat16):
    shapes = ((2, queries, 16, head_dim), (2, keys, 16, head_dim))
    return tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_cpu_is_plain():
    assert choose_backend(*_qk()) == "xla"


@pytest.mark.usefixtures("one_device")
def test_tpu_takes_the_kernel_where_it_can_and_pays():
    def pick(*args, **kwargs):
        return choose_backend(*args, platform="tpu", **kwargs)

    assert pick(*_qk()) == "splash"
    assert pick(*_qk(head_dim=200, dtype=jnp.float32)) == "splash"
    assert pick(*_qk(), mask=jax.ShapeDtypeStruct((2, 1, 1, 2049), bool)) == "splash"
    assert pick(*_qk(417, 417)) == "short"  # 80 % hidden
    assert pick(*_qk(1024, 1024)) == "short"
    assert pick(*_qk(4097, 4097)) == "splash"
    assert pick(*_qk(417, 417), mask=jax.ShapeDtypeStruct((2, 1, 1, 417), bool)) == "short"
    assert pick(*_qk(417, 417, dtype=jnp.float16)) == "xla"
    assert pick(*_qk(417, 417), mask=jax.ShapeDtypeStruct((2, 1, 417, 417), bool)) == "xla"
    assert pick(*_qk(77, 77)) == "xla"  # a text
    assert pick(*_qk(queries=1)) == "xla"  # one step of decoding
    assert pick(*_qk(), bias=jax.ShapeDtypeStruct((1, 16, 2049, 2049), jnp.float32)) == "xla"
    assert pick(*_qk(), mask=jax.ShapeDtypeStruct((2, 1, 2049, 2049), bool)) == "xla"


def test_a_kernel_is_not_left_to_the_partitioner():
    """On several devices a Mosaic kernel needs a mesh in the context."""
    assert jax.device_count() > 1
    assert choose_backend(*_qk(), platform="tpu") == "xla"
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        assert choose_backend(*_qk(), platform="tpu") == "splash"


def test_gpu_limits(monkeypatch):
    class Gpu:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [Gpu()])
    assert choose_backend(*_qk()) == "cudnn"
    assert choose_backend(*_qk(dtype=jnp.float32)) == "xla"
    assert choose_backend(*_qk(head_dim=200)) == "xla"
    assert choose_backend(*_qk(), mask=jax.ShapeDtypeStruct((2, 1, 1, 2049), bool)) == "xla"
    Gpu.compute_capability = "9.0"
    assert choose_backend(*_qk(head_dim=200)) == "cudnn"
    Gpu.compute_capability = "7.5"
    assert choose_backend(*_qk()) == "xla"


def test_forced_and_preferred(monkeypatch):
    bias = jax.ShapeDtypeStruct((1, 1, 2049, 2049), jnp.float32)
    assert choose_backend(*_qk(), backend="splash") == "splash"
    with pytest.raises(ValueError, match="adds no bias"):
        choose_backend(*_qk(), bias=bias, backend="splash")
    with pytest.raises(ValueError, match="no GPU"):
        choose_backend(*_qk(), backend="cudnn")
    with pytest.raises(ValueError, match="4353 tokens are more than 4352"):
        choose_backend(*_qk(4353, 4353), backend="short")
    with pytest.raises(ValueError, match="does not fit 16 MiB"):
        choose_backend(*_qk(), backend="short")
    with prefer_backend("splash"):
        assert choose_backend(*_qk(64, 64)) == "splash"
        assert choose_backend(*_qk(), bias=bias) == "xla"
    with prefer_backend("short"):
        assert choose_backend(*_qk(64, 64)) == "short"
        assert choose_backend(*_qk()) == "xla"
    assert choose_backend(*_qk()) == "xla"
    monkeypatch.setenv(choice.ENVIRONMENT, "short_interpret")
    assert choose_backend(*_qk(7, 7)) == "short_interpret"


def test_names_that_a_user_may_know():
    for name in ("flash", "pallas", "splash"):
        assert choose_backend(*_qk(), backend=name) == "splash"
        assert choose_backend(*_qk(), backend=f"{name}_interpret") == "splash_interpret"
    with prefer_backend("pallas_interpret"):
        assert choose_backend(*_qk()) == "splash_interpret"
    assert choose_backend(*_qk(), backend="plain") == "xla"


def test_unknown_names_say_where_they_stand(monkeypatch):
    with pytest.raises(ConfigError, match=r"'quick'.*splash_interpret"):
        choose_backend(*_qk(), backend="quick")
    with pytest.raises(ConfigError, match="'quick'"), prefer_backend("quick"):
        pass
    monkeypatch.setenv(choice.ENVIRONMENT, "fast")
    with pytest.raises(ConfigError, match=r"\$IV2_ATTENTION is 'fast'"):
        choose_backend(*_qk())


@pytest.mark.usefixtures("one_device")
def test_the_chip_is_that_of_the_mesh_in_the_context():
    """What fits depends on the chip's memory; without a mesh the smallest is assumed."""
    assert choice.device_kind() == jax.devices()[0].device_kind
    with choice.trace_for("tpu"):
        assert choice.device_kind() is None
        kind = jax.sharding.AbstractDevice("TPU v5", 1, "tpu")
        mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=kind)
        with jax.sharding.use_abstract_mesh(mesh):
            assert choice.device_kind() == "TPU v5"
            assert choose_backend(*_qk()) == "short"
        assert choose_backend(*_qk()) == "splash"


def test_logged_once(caplog):
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "iv2_jax.kernels.choice"):
        for _ in range(3):
            choose_backend(*_qk(33, 33))
            choose_backend(*_qk(33, 33), platform="tpu")
    assert len(caplog.messages) == 2
    assert "33 queries" in caplog.messages[0]
    assert "xla; not short: fewer than 128" in caplog.messages[1]
    assert "; not splash: fewer than" in caplog.messages[1]


def test_preference_reaches_the_front():
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 1, 8)), jnp.float32)
    with prefer_backend("pallas_interpret"):
        text = jax.jit(lambda x: dot_product_attention(x, x, x)).lower(q).as_text()
        dropped = dot_product_attention(q, q, q, dropout=lambda w: 0 * w)
    plain = jax.jit(lambda x: dot_product_attention(x, x, x, scale=8**-0.5)).lower(q).as_text()
    assert "while" in text
    assert "while" not in plain
    np.testing.assert_array_equal(dropped, np.zeros_like(q))
