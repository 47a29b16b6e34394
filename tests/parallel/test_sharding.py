"""The sharding table: refusals, fallbacks, the optimizer's copies, and slices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv2_jax.errors import ConfigError
from iv2_jax.models import teachers
from iv2_jax.parallel import rules
from iv2_jax.parallel.mesh import AXES, MeshConfig, keep_rows_split, make_mesh
from iv2_jax.train.program import build_program
from tests.train import toy


def _mesh(*sizes):
    devices = np.asarray(jax.devices()[: int(np.prod(sizes))])
    return Mesh(devices.reshape(sizes), AXES)


def _boxed(shape, *names):
    value = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nn.LogicallyPartitioned(value, names=names or (None,) * len(shape))


LARGE = {"encoder": {"table": _boxed((1001, 1001), "tokens", "embed")}}


def test_a_large_parameter_that_nothing_splits_is_refused():
    with pytest.raises(ConfigError, match=r"encoder/table \(1001, 1001\), 3.8 MiB") as error:
        rules.shardings(LARGE, _mesh(2, 4, 1), MeshConfig(max_replicated_mib=1))
    assert "embed 1001 does not divide by fsdp 4" in str(error.value)
    assert "mesh.allow_replicated" in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        ((2, 4, 1), MeshConfig(max_replicated_mib=1, allow_replicated=(".*/table",))),
        ((2, 4, 1), MeshConfig(max_replicated_mib=4)),
        ((8, 1, 1), MeshConfig(max_replicated_mib=1)),  # replicas are what such a mesh is
    ],
    ids=["allowed", "small_enough", "replicas_only"],
)
def test_what_may_stay_whole(sizes, config):
    _, (row,) = rules.shardings(LARGE, _mesh(*sizes), config)
    assert not any(row.spec)
    assert row.bytes_per_device == 4 * 1001**2


def test_the_report_names_fallbacks_and_bytes():
    tree = {"kernel": _boxed((250, 1024), "embed", "heads"), "bias": _boxed((64,), "embed")}
    _, rows = rules.shardings(tree, _mesh(2, 4, 1))
    text = rules.table(rows)
    assert "embed 250 does not divide by fsdp 4; fsdp taken by dimension 1 (1024)" in text
    assert f"{250 * 1024 * 4 / 4 / 2**20:.2f}" in text


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((512, 1024), PartitionSpec("fsdp"), PartitionSpec("fsdp", "data")),
        ((513, 1024), PartitionSpec(None, "fsdp"), PartitionSpec(None, ("fsdp", "data"))),
        ((513, 1028), PartitionSpec(None, "fsdp"), PartitionSpec(None, "fsdp")),
        ((64, 4), PartitionSpec(), PartitionSpec()),  # small
    ],
)
def test_the_optimizers_copies_are_split_over_data_too(shape, spec, expected):
    mesh = _mesh(2, 4, 1)
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    got = rules.spread_over_data(NamedSharding(mesh, spec), leaf)
    assert got.spec == expected


def test_a_step_with_a_split_optimizer_is_the_same_step():
    config = toy.config(width=512, batch_size=8, mesh={"data": 4, "fsdp": 2})
    x = jax.random.normal(jax.random.key(1), (8, 512))
    results = []
    for split in (False, True):
        mesh_config = dataclasses.replace(config.mesh, shard_optimizer=split)
        changed = dataclasses.replace(config, mesh=mesh_config)
        program = build_program(changed, changed.make_stage(), make_mesh(mesh_config))
        state, metrics = program.train_step(
            program.init(jax.random.key(0)), {}, {"x": x}, jax.random.key(2)
        )
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 2]
        held = moments[0].sharding.shard_shape(moments[0].shape)
        assert np.prod(held) == 512 * 512 // (8 if split else 2)
        kernel = state.params["dense"]["kernel"]
        assert np.prod(kernel.sharding.shard_shape(kernel.shape)) == 512 * 512 // 2
        results.append((metrics["loss"], kernel))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-7)


@pytest.mark.parametrize("name", ["internvl_6b", "videomaev2_g", "internvideo2_1b"])
def test_teachers_name_their_axes(name):
    """By name, a layer's width is split; by size alone the MLP's width or the layers would be."""
    boxed = jax.eval_shape(teachers.get(name, {}).boxed_init, jax.random.key(0))
    _, rows = rules.shardings(boxed, _mesh(2, 4, 1))
    assert all(any(row.logical) for row in rows if row.bytes_per_device > 2**22)
    kernels = [row for row in rows if row.path.endswith("fc1/kernel")]
    assert kernels
    assert all(row.spec == PartitionSpec(None, "fsdp") for row in kernels)


def test_activations_keep_their_rows_when_weights_are_split():
    """The weights are gathered, as FSDP means; no activation is."""
    mesh = _mesh(2, 4, 1)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    kernel = NamedSharding(mesh, PartitionSpec("fsdp"))

    def layer(x: Any, w: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jnp.sum(keep_rows_split(keep_rows_split(x) @ w))

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=kernel)
    text = jax.jit(layer).lower(x, w).compile().as_text()
    assert "all-gather" in text
    assert "f32[8,32]" in text  # eight of 64 rows, whole in width
    assert "f32[64" not in text


@pytest.mark.parametrize("rows", [3, 8])
def test_rows_outside_a_mesh_or_that_do_not_divide_are_left_alone(rows):
    x = jnp.ones((rows, 4))
    if rows == 3:
        with jax.sharding.use_abstract_mesh(_mesh(2, 4, 1).abstract_mesh):
            assert keep_rows_split(x) is x
    else:
        assert keep_rows_split(x) is x


class _FakeTpu:
    """A device as far as laying out a mesh looks at it."""

    platform, device_kind, core_on_chip = "tpu", "TPU v4", 0

    def __init__(self, index, slice_index):
        self.id, self.slice_index = index, slice_index
        self.process_index = index // 4
        inside = index % 8
        self.coords = [inside // 4, inside // 2 % 2, inside % 2]


def test_slices_lie_along_data():
    devices = [_FakeTpu(i, i // 8) for i in range(16)]
    mesh = make_mesh(MeshConfig(data=4, fsdp=4), devices)
    of_row = [{d.slice_index for d in row.flat} for row in mesh.devices]
    assert of_row == [{0}, {0}, {1}, {1}]


def test_replicas_that_would_cross_slices_are_refused():
    devices = [_FakeTpu(i, i // 8) for i in range(16)]
    with pytest.raises(ConfigError, match=r"mesh\.data 1 does not divide over 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=16), devices)


def test_a_broken_pattern_is_named():
    with pytest.raises(ConfigError, match=r"mesh.allow_replicated: '\('"):
        MeshConfig(allow_replicated=("(",))
