"""What is added up, against programs whose sums are known by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv2_jax.parallel.plan import count, hlo, traced

N = 16
PRODUCT = 2 * N**3


def _stack(x, w):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]


def _nested(x, w):
    return jax.lax.scan(lambda c, _: (_stack(c, w), None), x, None, length=5)[0]


def _gradient_with_remat(x, w):
    body = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
    return jax.grad(lambda x, w: jnp.sum(jax.lax.scan(body, x, w)[0]), (0, 1))(x, w)


def _strided(x, kernel):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=names)


def _ended_by_data(x, w):
    """At most five products; and a condition whose only constant bounds no counter."""

    def more(carry):
        return (carry[0] * 1024 < jnp.argmax(w[0, 0]) * 7) & (carry[0] < 5)

    return jax.lax.while_loop(more, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w[0])), (0, x))[1]


SQUARE, STACK = (N, N), (7, N, N)
# SAME with stride 2 pads one row and column at the end: 8 x 3 - 1 pairs along each.
CONVOLUTION = 2 * 2 * 4 * 8 * 23**2


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda a, b: a @ b, (SQUARE, SQUARE), PRODUCT),
        (_stack, (SQUARE, STACK), 7 * PRODUCT),
        (_nested, (SQUARE, STACK), 35 * PRODUCT),
        (_gradient_with_remat, (SQUARE, STACK), 4 * 7 * PRODUCT),  # forward twice, backward
        (_ended_by_data, (SQUARE, STACK), 5 * PRODUCT),
        (_strided, ((2, 16, 16, 4), (3, 3, 4, 8)), CONVOLUTION),
    ],
    ids=["product", "scan", "nested_scans", "remat", "ended_by_data", "convolution"],
)
def test_flops_of_compiled_and_traced(function, shapes, expected):
    trace = jax.jit(function).trace(*(jnp.ones(shape) for shape in shapes))
    assert traced.count(trace.jaxpr).total == expected
    counted = count.count(trace.lower().compile().as_text(), 1)
    assert counted.flops == expected
    assert not counted.unknown_loops


def test_conditions_that_reduce_are_read():
    """A draw from a beta distribution is loops in loops, until all samples are accepted."""
    draw = jax.jit(lambda key: jax.random.beta(key, 0.8, 0.8, (4,)))
    text = draw.lower(jax.random.key(0)).compile().as_text()
    assert count.count(text, 1).unknown_loops


def test_a_gradient_of_a_convolution_counts_no_holes():
    x, kernel = jnp.ones((2, 16, 16, 4)), jnp.ones((3, 3, 4, 8))
    trace = jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(_strided(x, k))), (0, 1))).trace(
        x, kernel
    )
    assert traced.count(trace.jaxpr).total == 3 * CONVOLUTION
    assert count.count(trace.lower().compile().as_text(), 1).flops == 3 * CONVOLUTION


def test_a_loop_reads_slices_of_its_weights_not_all_of_them():
    layers, width = 50, 64
    w, x = jnp.ones((layers, width, width)), jnp.ones((width, width))
    text = jax.jit(_stack).lower(x, w).compile().as_text()
    once = 4 * width * width
    moved = count.count(text, 1).bytes
    # A turn reads a slice and the carry and writes one; all the weights would be 50 times that.
    assert 3 * layers * once <= moved <= 12 * layers * once


def test_collectives_in_a_loop_count_every_turn():
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))

    def put(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, axes_of(axes)))

    def axes_of(axes):
        return PartitionSpec(*axes)

    # Rows lie over both axes, weights over fsdp: gathered layer by layer.
    rows = NamedSharding(mesh, axes_of((("data", "fsdp"),)))
    whole = NamedSharding(mesh, PartitionSpec())

    def step(x, w):
        def body(c, w):
            w = jax.lax.with_sharding_constraint(w, whole)
            return jax.lax.with_sharding_constraint(jnp.tanh(c @ w), rows), None

        return jax.lax.scan(body, x, w)[0]

    compiled = jax.jit(step, out_shardings=rows).lower(
        put((64, N), ("data", "fsdp")), put((6, N, N), None, "fsdp")
    )
    found = count.count(compiled.compile().as_text(), 8)
    gathers = {c.group: t for c, t in found.collectives.items() if c.kind == "all-gather"}
    assert sum(t.payload for t in gathers.values()) == 6 * N * N * 4
    assert sum(t.sent for t in gathers.values()) == 6 * N * N * 4 * 3 / 4
    assert {len(group) for group in gathers} == {4}
    assert found.flops == 6 * 2 * 8 * N * N


def _line(attributes):
    return hlo.Instruction("all-reduce.1", "all-reduce", (), (), attributes, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=y", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x=y", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x=y", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x=y", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_replica_groups(text, expected):
    assert hlo.replica_groups(_line(", channel_id=1, " + text), 4) == expected


def test_replica_groups_of_another_form_are_an_error():
    with pytest.raises(ValueError, match="unknown form"):
        hlo.replica_groups(_line("replica_groups=<new>"), 4)


TPU_TEXT = """\
HloModule jit_f, is_scheduled=true

%fused_rs (param_0.1: f32[8,16]) -> f32[2,16] {
  %param_0.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[8,16]{1,0:T(8,128)} all-reduce(%param_0.1), replica_groups=[1,4]<=[4], \
to_apply=%add
  %constant.9 = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[2,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.3, %constant.9, \
%constant.9), dynamic_slice_sizes={2,16}
}

%fused_batched (param_0.2: bf16[4,8,32], param_1.2: bf16[4,32,16]) -> bf16[4,8,16] {
  %param_0.2 = bf16[4,8,32]{2,1,0} parameter(0)
  %param_1.2 = bf16[4,32,16]{2,1,0} parameter(1)
  ROOT %convolution.2 = bf16[4,8,16]{2,1,0} convolution(%param_0.2, %param_1.2), \
window={size=4 stride=3 pad=0_3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

%cond (p.1: (s32[], f32[8,16])) -> pred[] {
  %p.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %get-tuple-element.1 = s32[] get-tuple-element(%p.1), index=0
  %constant.1 = s32[] constant(3)
  ROOT %compare.1 = pred[] compare(%get-tuple-element.1, %constant.1), direction=LT
}

%body (p.2: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p.2 = (s32[], f32[8,16]{1,0}) parameter(0)
  %get-tuple-element.2 = s32[] get-tuple-element(%p.2), index=0
  %get-tuple-element.3 = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p.2), index=1
  %fusion.2 = f32[2,16]{1,0:T(8,128)S(1)} fusion(%get-tuple-element.3), kind=kCustom, \
calls=%fused_rs, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %tuple.1 = (s32[], f32[8,16]{1,0}) tuple(%get-tuple-element.2, %get-tuple-element.3)
}

ENTRY %main (a.1: bf16[4,8,32], b.1: bf16[4,32,16], c.1: (s32[], f32[8,16])) -> bf16[4,8,16] {
  %a.1 = bf16[4,8,32]{2,1,0} parameter(0)
  %b.1 = bf16[4,32,16]{2,1,0} parameter(1)
  %c.1 = (s32[], /*index=1*/f32[8,16]{1,0}) parameter(2)
  %while.1 = (s32[], f32[8,16]{1,0}) while(%c.1), condition=%cond, body=%body
  ROOT %fusion.1 = bf16[4,8,16]{2,1,0} fusion(%a.1, %b.1), kind=kOutput, calls=%fused_batched, \
backend_config={"window_config":{"estimated_cycles":"250"}}
}
"""


def test_what_only_the_tpu_compiler_writes():
    """Products as windowed convolutions, a fused reduce-scatter, on-chip buffers, cycles."""
    counted = count.count(TPU_TEXT, 4)
    assert counted.flops == 2 * 4 * 8 * 32 * 16
    assert counted.cycles == 250 + 3 * 100
    ((collective, traffic),) = counted.collectives.items()
    assert (collective.kind, collective.group) == ("reduce-scatter", (0, 1, 2, 3))
    assert (traffic.calls, traffic.payload) == (3, 3 * 8 * 16 * 4)
    product = 2 * (4 * 8 * 32 + 4 * 32 * 16 + 4 * 8 * 16)
    assert counted.bytes == product + 3 * 8 * 16 * 4  # the scattered result stays on the chip


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("jit(step)/jvp(Net)/while/body/blocks/mlp/up/dot_general",
         "dot_general of blocks/mlp/up, forward"),
        ("jit(step)/transpose(jvp(Net))/while/body/checkpoint/rematted_computation/mlp/mul",
         "mul of mlp, again"),
        ("jit(step)/transpose(jvp(Net))/blocks/mlp/dot_general",
         "dot_general of blocks/mlp, backward"),
        ("jit(step)/add", "add of the step, forward"),
    ],
)  # fmt: skip
def test_where_an_operation_comes_from(name, source):
    line = (
        f"ENTRY %m (a: f32[4]) -> f32[4] {{\n  %a = f32[4]{{0}} parameter(0)\n"
        f'  ROOT %n = f32[4]{{0}} negate(%a), metadata={{op_name="{name}"}}\n}}\n'
    )
    (operation,) = count.count(line, 1).operations
    assert operation.source == source


def test_an_unrolled_loop_steps_by_more_than_one():
    """As windowed products are: three turns in two steps of two."""
    text = TPU_TEXT.replace(
        "  ROOT %tuple.1 = (s32[], f32[8,16]{1,0}) tuple(%get-tuple-element.2,",
        "  %constant.2 = s32[] constant(2)\n"
        "  %add.1 = s32[] add(%get-tuple-element.2, %constant.2)\n"
        "  ROOT %tuple.1 = (s32[], f32[8,16]{1,0}) tuple(%add.1,",
    )
    assert text != TPU_TEXT
    assert count.count(text, 4).cycles == 250 + 2 * 100


def test_a_kernel_counts_by_its_blocks_on_every_device():
    from jax.experimental import pallas as pl

    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    spec = pl.BlockSpec((8, N), lambda i: (i, 0))
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    call = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((32, N), jnp.float32),
        grid=(4,),
        in_specs=[spec, pl.BlockSpec((N, N), lambda i: (0, 0))],
        out_specs=spec,
        interpret=True,
        name="products",
    )
    rows = PartitionSpec("data")
    split = jax.shard_map(
        call, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False
    )
    found = traced.count(jax.make_jaxpr(split)(jnp.ones((64, N)), jnp.ones((N, N))))
    assert found.kernels == {"products": 2 * 64 * N * N}
    assert found.calls == {"products": 2}
    assert found.outside == 0


SPREAD_TEXT = """\
HloModule jit_f, is_scheduled=true

%fused_start (p.1: f32[4,16]) -> (f32[4,16], f32[16,16]) {
  %p.1 = f32[4,16]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[16,16]{1,0} all-gather(%p.1), replica_groups=[1,4]<=[4], dimensions={0}
}

%async_collective_fusion.2 (p.2: f32[16,16], p.3: f32[4,16]) -> (f32[16,16], f32[16,16]) {
  %p.2 = f32[16,16]{1,0} parameter(0)
  %p.3 = f32[4,16]{1,0} parameter(1)
  %all-gather.2 = f32[16,16]{1,0} all-gather(%p.3), replica_groups=[1,4]<=[4], dimensions={0}
  %negate.1 = f32[16,16]{1,0} negate(%p.2)
  ROOT %tuple.1 = (f32[16,16]{1,0}, f32[16,16]{1,0}) tuple(%all-gather.2, %negate.1)
}

%fused_done (p.4: f32[4,16]) -> f32[16,16] {
  %p.4 = f32[4,16]{1,0} parameter(0)
  ROOT %all-gather.3 = f32[16,16]{1,0} all-gather(%p.4), replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (a.1: f32[4,16], b.1: f32[16,16]) -> f32[16,16] {
  %a.1 = f32[4,16]{1,0} parameter(0)
  %b.1 = f32[16,16]{1,0} parameter(1)
  %async-collective-start = f32[16,16]{1,0} fusion(%a.1), kind=kCustom, calls=%fused_start
  %fusion.2 = (f32[16,16]{1,0}, f32[16,16]{1,0}) fusion(%b.1, %a.1), kind=kLoop, \
calls=%async_collective_fusion.2
  ROOT %async-collective-done = f32[16,16]{1,0} fusion(%a.1), kind=kCustom, calls=%fused_done
}
"""


def test_a_collective_that_is_spread_over_fusions_counts_once():
    counted = count.count(SPREAD_TEXT, 4)
    ((_, traffic),) = counted.collectives.items()
    assert (traffic.calls, traffic.payload, traffic.sent) == (1, 16 * 16 * 4, 12 * 16 * 4)
    gathered, negated = (4 * 16 + 16 * 16) * 4, 2 * 16 * 16 * 4
    assert counted.bytes == gathered + negated


NESTED_TEXT = """\
HloModule jit_f, is_scheduled=true

%one_layer (p.1: f32[40,16,16], p.2: s32[]) -> f32[16,16] {
  %p.1 = f32[40,16,16]{2,1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %slice.1 = f32[1,16,16]{2,1,0} dynamic-slice(%p.1, %p.2, %zero.1, %zero.1), \
dynamic_slice_sizes={1,16,16}
  ROOT %bitcast.1 = f32[16,16]{1,0} bitcast(%slice.1)
}

%fused_product (p.3: f32[40,16,16], p.4: s32[], p.5: f32[8,16]) -> f32[8,16] {
  %p.3 = f32[40,16,16]{2,1,0} parameter(0)
  %p.4 = s32[] parameter(1)
  %p.5 = f32[8,16]{1,0} parameter(2)
  %fusion.1 = f32[16,16]{1,0} fusion(%p.3, %p.4), kind=kLoop, calls=%one_layer
  ROOT %dot.1 = f32[8,16]{1,0} dot(%p.5, %fusion.1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
}

ENTRY %main (b.1: s32[], c.1: f32[8,16]) -> f32[8,16] {
  %kept.1 = f32[40,16,16]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %b.1 = s32[] parameter(0)
  %c.1 = f32[8,16]{1,0} parameter(1)
  ROOT %fusion.2 = f32[8,16]{1,0} fusion(%kept.1, %b.1, %c.1), kind=kOutput, calls=%fused_product
}
"""


def test_of_what_all_layers_have_kept_a_layer_reads_its_own():
    """Also where a fusion inside a fusion takes the slice; to make room moves nothing."""
    counted = count.count(NESTED_TEXT, 1)
    assert counted.flops == 2 * 8 * 16 * 16
    assert counted.bytes == 4 * (16 * 16 + 2 * 8 * 16 + 1)


BETWEEN_SLICES = """\
HloModule jit_f, is_scheduled=true

ENTRY %main (a.1: f32[4,16]) -> f32[4,16] {
  %a.1 = f32[4,16]{1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (f32[4,16]{1,0}, u32[], token[]) send(%a.1, %after-all), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[4,16]{1,0}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[4,16]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %get-tuple-element.1 = f32[4,16]{1,0} get-tuple-element(%recv-done), index=0
}
"""


def test_what_goes_between_slices_goes_through_the_hosts():
    counted = count.count(BETWEEN_SLICES, 16)
    ((collective, traffic),) = counted.collectives.items()
    assert collective == count.Collective("all-reduce", (1, 2, 3, 4), between_slices=True)
    assert (traffic.calls, traffic.payload) == (1, 256)
    assert traffic.sent == 2 * 256 * 3 / 4
    assert counted.bytes == 2 * 256
