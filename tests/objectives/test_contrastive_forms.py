"""Forms of the contrastive loss: one value and gradient, whatever form and mesh; the sigmoid."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv2_jax.errors import ConfigError
from iv2_jax.objectives.contrastive import contrastive_loss, scale_gradient
from iv2_jax.parallel.mesh import AXES, BATCH_AXES

ROWS, WIDTH = 16, 6
TEMPERATURE = jnp.float32(0.07)
BIAS = jnp.float32(-3.0)
FORMS = ("dense", "chunked", "ring")
# data x fsdp x tensor
MESHES = ((1, 1, 1), (2, 1, 1), (1, 4, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4))


def _batch(seed=0, rows=ROWS):
    """Features, ids that repeat across devices, and a mask."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, rows, WIDTH)).astype(np.float32)
    ids = rng.integers(0, rows // 2, rows)
    return a, b, ids, rng.random(rows) < 0.75


def _step(kind, **options):
    """Loss and gradients, with the mesh known where the loss is traced alone, as in training."""

    def run(mesh, a, b, temperature, bias, ids, valid):
        def loss(a, b, temperature, bias):
            extra = {"bias": bias} if kind == "sigmoid" else {}
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return contrastive_loss(
                    a, b, temperature, ids, valid=valid, kind=kind, **extra, **options
                )

        grads = (0, 1, 2, 3) if kind == "sigmoid" else (0, 1, 2)
        return jax.value_and_grad(loss, argnums=grads)(a, b, temperature, bias)

    return run


def _on_mesh(shape, kind, a, b, ids, valid, **options):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, AXES)
    rows, whole = (NamedSharding(mesh, PartitionSpec(*x)) for x in ((BATCH_AXES,), ()))
    step = jax.jit(
        lambda *args: _step(kind, **options)(mesh, *args),
        in_shardings=(rows, rows, whole, whole, rows, rows if valid is not None else None),
    )
    return jax.tree.map(np.asarray, step(a, b, TEMPERATURE, BIAS, ids, valid))


def _by_hand(kind, a, b, ids, valid, temperature=float(TEMPERATURE)):
    """The loss in float64, pair by pair."""
    a, b, ids = (np.asarray(x)[valid] for x in (a, b, ids))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b.astype(np.float64)))
    scores = a @ b.T / temperature
    equal = ids[:, None] == ids[None, :]
    if kind == "sigmoid":
        judged = np.where(equal, 1, -1) * (scores + float(BIAS))
        return -np.log(1 / (1 + np.exp(-judged))).sum() / len(ids)
    total = 0.0
    for s in (scores, scores.T):
        logs = s - np.log(np.exp(s).sum(axis=1, keepdims=True))
        total -= (equal / equal.sum(axis=1, keepdims=True) * logs).sum(axis=1).mean() / 2
    return total


def _agree(got, wanted):
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    for x, y in zip(got[1], wanted[1], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


@pytest.fixture(scope="module", params=["softmax", "sigmoid"])
def reference(request):
    kind = request.param
    batch = _batch()
    return kind, batch, _on_mesh((1, 1, 1), kind, *batch)


def test_dense_is_the_formula(reference):
    kind, batch, (loss, _) = reference
    np.testing.assert_allclose(loss, _by_hand(kind, *batch), rtol=1e-5)


@pytest.mark.parametrize("shape", MESHES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_on_every_mesh(reference, form, shape):
    kind, batch, wanted = reference
    _agree(_on_mesh(shape, kind, *batch, form=form), wanted)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_of_any_size(reference, form, chunk):
    kind, batch, wanted = reference
    _agree(_on_mesh((2, 1, 1), kind, *batch, form=form, chunk_size=chunk), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_do_not_count_change_nothing(reference, form):
    """Whatever they hold, even NaN; and one device's rows may all be out."""
    kind, (a, b, ids, _), _ = reference
    valid = np.ones(ROWS, bool)
    valid[4:8] = valid[13] = False
    wanted = _by_hand(kind, a, b, ids, valid)
    a, b = (np.where(valid[:, None], x, np.nan) for x in (a, b))
    loss, grads = _on_mesh((2, 2, 1), kind, a, b, ids, valid, form=form)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for grad in grads[:2]:
        assert np.isfinite(grad).all()
        assert (grad[~valid] == 0).all()
        assert (grad[valid] != 0).all()
    assert np.isfinite(grads[2:]).all()


@pytest.mark.parametrize("form", FORMS)
def test_no_row_that_counts_is_zero(reference, form):
    kind, (a, b, ids, _), _ = reference
    loss, grads = _on_mesh((2, 1, 1), kind, a, b, ids, np.zeros(ROWS, bool), form=form)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("form", FORMS)
def test_all_rows_count_without_a_mask(reference, form):
    kind, (a, b, ids, _), _ = reference
    wanted = _on_mesh((1, 1, 1), kind, a, b, ids, np.ones(ROWS, bool))
    _agree(_on_mesh((4, 1, 1), kind, a, b, ids, None, form=form), wanted)


def test_temperature_gradient_is_the_slope():
    """Of float64 finite differences, for both kinds and the ring's own derivative."""
    a, b, ids, valid = _batch(3)
    for kind in ("softmax", "sigmoid"):
        up, down = (
            _by_hand(kind, a, b, ids, valid, float(TEMPERATURE) + step) for step in (1e-5, -1e-5)
        )
        _, grads = _on_mesh((4, 1, 1), kind, a, b, ids, valid, form="ring")
        np.testing.assert_allclose(grads[2], (up - down) / 2e-5, rtol=1e-4)


def test_low_temperature_stays_exact():
    """At 0.001 scores reach a thousand, and the loss is a small difference of such."""
    a, _, _, _ = _batch(1)
    ids = jnp.arange(ROWS)
    for form in FORMS:
        loss, grad = jax.jit(
            jax.value_and_grad(
                lambda a, form=form: contrastive_loss(a, a, jnp.float32(1e-3), ids, form=form)
            )
        )(a)
        assert 0 <= loss < 1e-3
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("form", FORMS[1:])
def test_bfloat16_features_keep_their_dtype(form):
    a, b, ids, valid = _batch()
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in (a, b))
    loss, grads = _on_mesh((4, 1, 1), "softmax", a, b, ids, valid, form=form)
    wanted, dense = _on_mesh((1, 1, 1), "softmax", a, b, ids, valid)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert grads[0].dtype == jnp.bfloat16
    for x, y in zip(grads[:2], dense[:2], strict=True):
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), rtol=0.01, atol=1e-4)


def test_gradient_scale_goes_with_the_ring():
    a, b, ids, _ = (jnp.asarray(x) for x in _batch())

    def grad(factor):
        return jax.grad(
            lambda a: contrastive_loss(scale_gradient(a, factor), b, TEMPERATURE, ids, form="ring")
        )(a)

    np.testing.assert_allclose(grad(0.25), 0.25 * grad(1.0), rtol=1e-5, atol=1e-7)


def test_ring_works_with_a_mesh_that_is_set():
    a, b, ids, valid = _batch()
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), BATCH_AXES)
    wanted = contrastive_loss(a, b, TEMPERATURE, ids, valid=valid)
    with jax.set_mesh(mesh):
        a, b, ids, valid = jax.device_put(
            (a, b, ids, valid), NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        )
        loss = jax.jit(
            lambda *x: contrastive_loss(x[0], x[1], TEMPERATURE, x[2], valid=x[3], form="ring")
        )(a, b, ids, valid)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_no_device_of_a_ring_holds_the_batch():
    """In the compiled program: neighbours exchange parts; nothing is gathered, nothing is B x B."""
    rows = 512
    a, b, ids, valid = _batch(rows=rows)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4, 1), AXES)
    split = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split),
        (a, b, jnp.asarray(ids), jnp.asarray(valid)),
    )
    texts = {}
    for form in FORMS:

        def run(a, b, ids, valid, form=form):
            return _step("softmax", form=form)(mesh, a, b, TEMPERATURE, BIAS, ids, valid)

        texts[form] = jax.jit(run).lower(*args).compile().as_text()
    assert f"{rows // 8},{rows // 8}]" in texts["ring"]  # a block of scores
    assert "collective-permute" in texts["ring"]
    for sign in ("all-gather", "all-to-all", f"[{rows},", f",{rows}]"):
        assert sign not in texts["ring"], sign
        assert sign in texts["dense"] or sign == "all-to-all"
    assert "all-gather" in texts["chunked"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "rign"}, "did you mean 'ring'"),
        ({"kind": "softmin"}, "did you mean 'softmax'"),
        ({"kind": "sigmoid"}, "needs bias"),
        ({"bias": BIAS}, "belongs to kind='sigmoid'"),
        ({"form": "ring", "all_a": 0}, "leave all_a"),
        ({"valid": np.ones(ROWS, bool), "all_ids": 0}, "whole batch"),
    ],
)
def test_settings_that_contradict_each_other(options, message):
    a, b, ids, _ = _batch()
    with pytest.raises(ConfigError, match=message):
        contrastive_loss(a, b, TEMPERATURE, ids, **options)


@pytest.mark.parametrize("form", FORMS[1:])
def test_frames_need_the_dense_form(form):
    a, b, ids, valid = _batch()
    frames = np.stack([a, a[::-1]], axis=1)
    assert contrastive_loss(frames, b, TEMPERATURE, ids, valid=valid) > 0
    with pytest.raises(ConfigError, match="pool the frames"):
        contrastive_loss(frames, b, TEMPERATURE, ids, form=form)


def test_frames_with_rows_that_do_not_count():
    a, b, ids, valid = _batch()
    frames = np.stack([a, a[::-1]], axis=1)
    for kind, extra in (("softmax", {}), ("sigmoid", {"bias": BIAS})):
        few = contrastive_loss(frames[valid], b[valid], TEMPERATURE, ids[valid], kind=kind, **extra)
        all_rows = contrastive_loss(frames, b, TEMPERATURE, ids, valid=valid, kind=kind, **extra)
        np.testing.assert_allclose(all_rows, few, rtol=1e-5)


def test_a_batch_that_does_not_divide_is_refused():
    a, b, ids, _ = _batch(rows=12)
    mesh = Mesh(np.array(jax.devices()).reshape(8, 1, 1), AXES)
    with (
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
        pytest.raises(ConfigError, match="12 rows does not divide over 8"),
    ):
        contrastive_loss(a, b, TEMPERATURE, ids, form="ring")


def test_the_ring_is_not_for_the_inside_of_a_shard_map():
    a, b, ids, _ = _batch()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = PartitionSpec("data")
    local = jax.shard_map(
        lambda a, b, ids: contrastive_loss(a, b, TEMPERATURE, ids, form="ring"),
        mesh=mesh,
        in_specs=(rows,) * 3,
        out_specs=PartitionSpec(),
    )
    with pytest.raises(ConfigError, match="outside of a shard_map"):
        local(a, b, ids)


def test_sigmoid_positives_are_all_pairs_of_an_id():
    """Two rows of one id: their crossed pairs count as positives too."""
    a = jnp.eye(3)
    scores = jnp.eye(3) / TEMPERATURE + BIAS
    for ids, positives in (([0, 1, 2], 3), ([0, 0, 2], 5)):
        signs = np.where(np.equal.outer(ids, ids), 1, -1)
        assert (signs == 1).sum() == positives
        loss = contrastive_loss(a, a, TEMPERATURE, jnp.array(ids), kind="sigmoid", bias=BIAS)
        np.testing.assert_allclose(loss, jax.nn.softplus(-signs * scores).sum() / 3, rtol=1e-5)


def test_pairs_of_forms_agree_on_many_batches():
    """Random ids and masks; on one device, where it is quick."""
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    for kind, form in itertools.product(("softmax", "sigmoid"), FORMS[1:]):
        got, wanted = (
            jax.jit(lambda *x, f=f, kind=kind: _step(kind, form=f)(mesh, *x))
            for f in (form, "dense")
        )
        for seed in range(5):
            a, b, ids, valid = _batch(seed)
            args = (a, b, TEMPERATURE, BIAS, ids, valid)
            _agree(*(jax.tree.map(np.asarray, f(*args)) for f in (got, wanted)))
