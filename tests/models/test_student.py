from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from iv2_jax.errors import ConfigError
from iv2_jax.models import zoo
from iv2_jax.models.student import AlignmentConfig, Student, pool_to_grid

TINY = zoo.get("test_tiny_pretrain")
VISIBLE = np.array([[0, 1, 7, 20, 30, 64], [0, 5, 16, 17, 32, 33]], np.int32)


def _inputs(config, seed=0):
    leaves, treedef = jax.tree.flatten(zoo.abstract_params(config))
    rng = np.random.default_rng(seed)
    values = [rng.normal(0.2, 0.2, size=leaf.shape).astype(np.float32) for leaf in leaves]
    encoder = config.encoder
    shape = (2, encoder.num_frames, encoder.image_size, encoder.image_size, 3)
    video = rng.normal(size=shape).astype(np.float32)
    return {"params": jax.tree.unflatten(treedef, values)}, video


def _change(config, **branches):
    """Replaces fields of branches: `clip={...}`, `mae={...}`."""
    return dataclasses.replace(
        config,
        **{k: dataclasses.replace(getattr(config, k), **v) for k, v in branches.items()},
    )


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ({"clip": {"layers": (3,)}}, r"clip.layers=\(3,\).*0\.\.2"),
        ({"mae": {"layers": (-1, 0)}}, "mae.layers.*ascending"),
        ({"mae": {"layers": ()}}, "layers"),
        ({"clip": {"decoder": "cnn"}}, "decoder='cnn': choose one of linear, mlp"),
        ({"clip": {"width": 0}}, "width=0"),
        ({"clip": {"grid": (2, 2)}}, r"grid=\(2, 2\)"),
    ],
)
def test_config_refuses(branches, message):
    with pytest.raises(ConfigError, match=message):
        _change(TINY, **branches)


def test_parameter_tree_is_the_contract():
    config = dataclasses.replace(TINY, final_decoder="mlp")
    tree = traverse_util.flatten_dict(zoo.abstract_params(config), sep="/")
    ours = {k: v.shape for k, v in tree.items() if not k.startswith("encoder/")}
    assert ours == {
        "clip_pos_embed": (1, 65, 32),
        "mae_pos_embed": (1, 64, 32),
        "clip_decoder/fc/kernel": (2, 32, 40),
        "clip_decoder/fc/bias": (2, 40),
        "clip_decoder/norm/scale": (2, 40),
        "clip_decoder/norm/bias": (2, 40),
        "mae_decoder/fc1/kernel": (1, 32, 32),
        "mae_decoder/fc1/bias": (1, 32),
        "mae_decoder/fc2/kernel": (1, 32, 36),
        "mae_decoder/fc2/bias": (1, 36),
        "mae_decoder/norm/scale": (1, 36),
        "mae_decoder/norm/bias": (1, 36),
        "final_clip_decoder/fc1/kernel": (24, 24),
        "final_clip_decoder/fc1/bias": (24,),
        "final_clip_decoder/fc2/kernel": (24, 20),
        "final_clip_decoder/fc2/bias": (20,),
        "final_clip_decoder/norm/scale": (20,),
        "final_clip_decoder/norm/bias": (20,),
    }
    distill = zoo.abstract_params(zoo.get("test_tiny_distill"))
    assert set(distill) == {"encoder", "clip_pos_embed", "clip_decoder", "final_clip_decoder"}


def test_separable_positions_of_the_branches():
    encoder = dataclasses.replace(TINY.encoder, separable_positions=True)
    tree = zoo.abstract_params(dataclasses.replace(TINY, encoder=encoder))
    names = {k for k in tree if "pos_embed" in k}
    assert names == {
        "clip_pos_embed_spatial",
        "clip_pos_embed_temporal",
        "clip_pos_embed_cls",
        "mae_pos_embed_spatial",
        "mae_pos_embed_temporal",
    }


def test_output_shapes_and_unit_length():
    params, video = _inputs(TINY)
    out = jax.jit(Student(TINY).apply)(params, video, VISIBLE)
    assert out.clip.shape == (2, 2, 6, 40)
    assert out.mae.shape == (1, 2, 5, 36)
    assert out.final.shape == (2, 20)
    assert out.clip_weight is None
    assert out.mae_weight is None
    for x in (out.clip, out.mae, out.final):
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1.0, rtol=1e-5)


def test_branches_read_their_own_blocks():
    """Layers that are neither the same set nor a slice of each other."""
    config = _change(TINY, clip={"layers": (0, 2)}, mae={"layers": (1,)})
    params, video = _inputs(config)
    alone = dataclasses.replace(config, mae=None, final_width=0)

    @jax.jit
    def run(params, video):
        clip_only = {
            "params": {
                k: params["params"][k] for k in ("encoder", "clip_pos_embed", "clip_decoder")
            }
        }
        return (
            Student(config).apply(params, video, VISIBLE),
            Student(alone).apply(clip_only, video, VISIBLE),
        )

    both, clip = run(params, video)
    np.testing.assert_allclose(both.clip, clip.clip, rtol=1e-5, atol=1e-6)
    assert clip.mae is None
    assert clip.final is None


def test_without_normalisation():
    config = dataclasses.replace(TINY, normalize=False, mae=None)
    params, video = _inputs(config)
    out = jax.jit(Student(config).apply)(params, video, VISIBLE)
    assert np.abs(np.linalg.norm(out.clip, axis=-1) - 1).min() > 0.01


def test_gradients_are_finite_where_decoder_outputs_vanish():
    config = dataclasses.replace(TINY, mae=None)
    params, video = _inputs(config)
    norm = params["params"]["clip_decoder"]["norm"]
    norm["scale"], norm["bias"] = jnp.zeros_like(norm["scale"]), jnp.zeros_like(norm["bias"])

    def loss(params):
        return jnp.sum(Student(config).apply(params, video, VISIBLE).clip)

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert value == 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def _pool_by_hand(features, patches, from_grid, to_grid):
    """Grid pooling written as loops over cells and visible patches."""
    cells = np.zeros(
        (features.shape[0], features.shape[1], int(np.prod(to_grid)), features.shape[3])
    )
    weight = np.zeros((features.shape[1], cells.shape[2]))
    for b in range(features.shape[1]):
        for c, cell in enumerate(np.ndindex(*to_grid)):
            total = 0.0
            for m, patch in enumerate(patches[b]):
                place = np.unravel_index(patch, from_grid)
                volume = 1.0
                for p, q, n, k in zip(place, cell, from_grid, to_grid, strict=True):
                    volume *= max(0.0, min((p + 1) / n, (q + 1) / k) - max(p / n, q / k))
                if volume > 1e-9:
                    cells[:, b, c] += volume * features[:, b, m]
                    total += volume
            if total:
                cells[:, b, c] /= total
                weight[b, c] = 1
    return cells, weight


@pytest.mark.parametrize("to_grid", [(2, 3, 2), (4, 2, 2), (8, 5, 7), (1, 1, 1)])
def test_pooling_to_another_grid(to_grid):
    rng = np.random.default_rng(0)
    from_grid = (4, 4, 4)
    patches = np.sort(np.stack([rng.permutation(64)[:6] for _ in range(2)]))
    features = rng.normal(size=(2, 2, 6, 3)).astype(np.float32)
    cells, weight = pool_to_grid(jnp.asarray(features), jnp.asarray(patches), from_grid, to_grid)
    expected, expected_weight = _pool_by_hand(features, patches, from_grid, to_grid)
    np.testing.assert_allclose(cells, expected, atol=1e-5)
    np.testing.assert_array_equal(weight, expected_weight)


def test_teacher_grids_that_differ():
    """A coarse image teacher without class token and a video teacher with half the frames."""
    config = _change(
        TINY, clip={"has_cls": False, "grid": (4, 3, 3)}, mae={"grid": (2, 4, 4), "has_cls": True}
    )
    params, video = _inputs(config)
    assert params["params"]["clip_pos_embed"].shape == (1, 64, 32)
    assert params["params"]["mae_pos_embed"].shape == (1, 65, 32)
    out = jax.jit(Student(config).apply)(params, video, VISIBLE)
    assert out.clip.shape == (2, 2, 36, 40)
    assert out.clip_weight.shape == (2, 36)
    assert out.mae.shape == (1, 2, 33, 36)
    assert out.mae_weight.shape == (2, 33)
    np.testing.assert_array_equal(out.mae_weight[:, 0], 1)  # the class token always counts
    assert 0 < out.clip_weight.sum() < out.clip_weight.size
    for x in (out.clip, out.mae):
        assert np.isfinite(x).all()


def test_a_grid_equal_to_the_students_is_no_other_grid():
    params, video = _inputs(TINY)
    same = _change(TINY, clip={"grid": TINY.encoder.grid})
    out = jax.jit(Student(same).apply)(params, video, VISIBLE)
    assert out.clip_weight is None
    assert out.clip.shape == (2, 2, 6, 40)


def test_clip_without_class_token_leaves_it_out():
    config = dataclasses.replace(_change(TINY, clip={"has_cls": False}), mae=None)
    assert isinstance(config.clip, AlignmentConfig)
    params, video = _inputs(config)
    out = jax.jit(Student(config).apply)(params, video, VISIBLE)
    assert out.clip.shape == (2, 2, 5, 40)


def test_no_mask_is_all_tokens_visible():
    """Also where the teacher has another grid."""
    config = _change(TINY, clip={"grid": (2, 3, 3)})
    variables, video = _inputs(config)
    apply = jax.jit(Student(config).apply)
    every = np.tile(np.arange(config.encoder.num_tokens, dtype=np.int32), (2, 1))
    whole, listed = apply(variables, video), apply(variables, video, every)
    assert whole.clip_weight.shape == (2, 1 + 18)
    for name in ("clip", "clip_weight", "final", "mae", "tokens", "pooled"):
        np.testing.assert_allclose(
            getattr(whole, name), getattr(listed, name), rtol=2e-5, atol=2e-6, err_msg=name
        )
    assert whole.mae_weight is None


def test_final_needs_a_pool():
    encoder = dataclasses.replace(TINY.encoder, pool=False)
    with pytest.raises(ConfigError, match=r"final_width=20 needs encoder\.pool"):
        dataclasses.replace(TINY, encoder=encoder)
