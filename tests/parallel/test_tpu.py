"""Options of the TPU compiler: for TPUs alone, changed by a variable."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.parallel import tpu


def _mesh(platform: str, kind: str = "TPU v4") -> SimpleNamespace:
    device = SimpleNamespace(platform=platform, device_kind=kind)
    return SimpleNamespace(devices=np.array([device]))


def test_other_platforms_get_none(monkeypatch):
    monkeypatch.setenv(tpu.VARIABLE, "nonsense")
    assert tpu.compiler_options(_mesh("cpu")) is None


def test_the_variable_changes_adds_and_takes_out(monkeypatch):
    monkeypatch.setenv(tpu.VARIABLE, "xla_enable_async_all_gather=, xla_new=7")
    options = tpu.compiler_options(_mesh("tpu"))
    assert options["xla_new"] == "7"
    assert "xla_enable_async_all_gather" not in options
    assert len(options) == len(tpu.COMPILER_OPTIONS)
    monkeypatch.setenv(tpu.VARIABLE, "xla_new")
    with pytest.raises(ConfigError, match="'xla_new' is not name=value"):
        tpu.compiler_options(_mesh("tpu"))


@pytest.mark.parametrize(
    ("kind", "kib"), [("TPU v4", None), ("TPU v5", 32768), ("TPU v5 lite", 32768), ("TPU v9", None)]
)
def test_on_chip_memory_of_an_operation_follows_the_chip(monkeypatch, kind, kib):
    name = "xla_tpu_scoped_vmem_limit_kib"
    assert tpu.compiler_options(_mesh("tpu", kind)).get(name) == kib
    monkeypatch.setenv(tpu.VARIABLE, f"{name}=65536")
    assert tpu.compiler_options(_mesh("tpu", kind))[name] == "65536"


@pytest.mark.tpu
def test_the_compiler_knows_them():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'iv2_jax[tpu]'")
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from iv2_jax.parallel import described
    from iv2_jax.parallel.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(fsdp=4), described.topology("v5e:2x2", 1).devices())
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((128, 128), np.float32, sharding=split)
    options = tpu.compiler_options(mesh)
    with described.quiet():
        jax.jit(lambda a, b: a @ b, compiler_options=options).lower(x, x).compile()
        with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
            jax.jit(lambda a: a, compiler_options={"xla_tpu_nonsense": 1}).lower(x).compile()
