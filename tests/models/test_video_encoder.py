from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import ConfigError
from iv2_jax.models import positions, zoo
from iv2_jax.models.layers import Precision
from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder

TINY = zoo.get("test_tiny")


def _video(config, batch=2):
    shape = (batch, config.num_frames, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _init(config, seed=0):
    """Parameters with every norm, bias and scale away from its neutral start."""
    shapes = zoo.abstract_params(config)
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    values = [rng.normal(0.2, 0.2, size=leaf.shape).astype(np.float32) for leaf in leaves]
    return {"params": jax.tree.unflatten(treedef, values)}


@pytest.fixture(scope="module")
def params():
    return _init(TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 33}, "width=33 is not a multiple of num_heads=2"),
        ({"pool_heads": 3}, "width=32 is not a multiple of pool_heads=3"),
        ({"image_size": 57}, "image_size=57 is not a multiple of patch_size=14"),
        ({"tubelet": 3}, "num_frames=4 is not a multiple of tubelet=3"),
        ({"depth": 0}, "depth=0"),
        ({"mlp_width": 64.0}, "mlp_width=64.0"),
        ({"width": 40}, "width=40.*multiple of 16"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0: must be in \[0, 1\)"),
        ({"remat": "some"}, "remat='some': choose one of none, named, dots, full"),
        ({"scan_unroll": 0}, "scan_unroll=0"),
        ({"image_positions": "mean"}, "image_positions='mean': choose one of none, shared, own"),
        ({"image_positions": "shared", "tubelet": 2}, "tubelet=2"),
        ({"image_positions": "own", "separable_positions": True}, "separable_positions"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **change)


def test_config_sizes():
    config = EncoderConfig(384, 12, 6, 1536, num_frames=16, tubelet=2)
    assert config.grid == (8, 16, 16)
    assert (config.num_patches, config.num_tokens) == (2048, 2049)
    assert dataclasses.replace(TINY, width=36, separable_positions=True).width == 36


def test_parameter_tree_is_the_contract():
    config = dataclasses.replace(TINY, qkv_bias=True, tubelet=2)
    tree = traverse_util.flatten_dict(zoo.abstract_params(config), sep="/")
    n, d, m, h, c = 1 + 2 * 16, 32, 64, 2, 24
    expected = {
        "patch_embed/kernel": (2, 14, 14, 3, d),
        "patch_embed/bias": (d,),
        "cls_token": (1, 1, d),
        "pos_embed": (1, n, d),
        "blocks/norm1/scale": (3, d),
        "blocks/norm2/scale": (3, d),
        "blocks/ls1/gamma": (3, d),
        "blocks/ls2/gamma": (3, d),
        "blocks/attn/qkv/kernel": (3, d, 3, h, d // h),
        "blocks/attn/qkv/bias": (3, 3, h, d // h),
        "blocks/attn/q_norm/scale": (3, d),
        "blocks/attn/k_norm/scale": (3, d),
        "blocks/attn/proj/kernel": (3, h, d // h, d),
        "blocks/attn/proj/bias": (3, d),
        "blocks/mlp/fc1/kernel": (3, d, m),
        "blocks/mlp/fc1/bias": (3, m),
        "blocks/mlp/fc2/kernel": (3, m, d),
        "blocks/mlp/fc2/bias": (3, d),
        "pool/proj/kernel": (2, d // 2, c),
        "pool/proj/bias": (c,),
    }
    for name in "qkv":
        expected[f"pool/norm_{name}/scale"] = expected[f"pool/norm_{name}/bias"] = (d,)
        expected[f"pool/{name}/kernel"] = (d, 2, d // 2)
        expected[f"pool/{name}/bias"] = (2, d // 2)
    assert {path: leaf.shape for path, leaf in tree.items()} == expected


def test_options_change_the_tree():
    config = dataclasses.replace(TINY, separable_positions=True, qk_norm=False)
    tree = zoo.abstract_params(config)
    assert {k: v.shape for k, v in tree.items() if k.startswith("pos_embed")} == {
        "pos_embed_spatial": (1, 16, 32),
        "pos_embed_temporal": (1, 4, 32),
        "pos_embed_cls": (1, 1, 32),
    }
    assert set(tree["blocks"]["attn"]) == {"qkv", "proj"}


def test_every_parameter_has_one_axis_name_for_each_axis():
    variables = jax.eval_shape(VideoEncoder(TINY).init, jax.random.key(0), _video(TINY))
    is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)  # noqa: E731
    known = {"layers", "embed", "mlp", "heads", "head_dim", "patch", "pixel", "tokens", "pool"}
    for path, box in jax.tree_util.tree_leaves_with_path(variables["params"], is_leaf=is_box):
        assert is_box(box), path
        assert len(box.names) == len(box.value.shape), path
        named = [name for name in box.names if name]
        assert set(named) <= known, path
        assert len(set(named)) == len(named), path


def test_positions_start_as_tables():
    config = dataclasses.replace(TINY, separable_positions=True, depth=1)
    variables = jax.jit(VideoEncoder(config).init)(jax.random.key(0), _video(config))
    params = meta.unbox(variables["params"])
    np.testing.assert_array_equal(params["pos_embed_cls"], 0.0)
    # frame 1: sine of the first temporal frequency, cosines from the middle on
    token = params["pos_embed_temporal"][0, 1]
    assert token[0] == np.float32(math.sin(1.0))
    assert token[config.width // 2] == np.float32(math.cos(1.0))


@pytest.mark.parametrize("change", [{}, {"separable_positions": True, "tubelet": 2}])
def test_visible_tokens_are_rows_of_all_tokens(change):
    config = dataclasses.replace(TINY, **change)
    params, video = _init(config), _video(config)
    visible = jnp.array([[0, 1, 7, 20, 30], [0, 5, 16, 17, 32]])

    @jax.jit
    def run(params, video):
        encoder = VideoEncoder(config)
        every = encoder.apply(params, video, method="embed")
        return every, encoder.apply(params, video, visible, method="embed")

    every, some = run(params, video)
    assert every.shape == (2, config.num_tokens, config.width)
    for row in range(2):
        np.testing.assert_allclose(some[row], every[row, visible[row]], rtol=1e-4, atol=1e-4)


def test_output_of_all_tokens_equals_listing_them(params):
    video = _video(TINY)
    listed = np.tile(np.arange(TINY.num_tokens, dtype=np.int32), (2, 1))
    apply = jax.jit(VideoEncoder(TINY).apply)
    a, b = apply(params, video), apply(params, video, listed)
    assert a.features is None
    assert a.tokens.shape == (2, TINY.num_tokens, TINY.width)
    assert a.pooled.shape == (2, TINY.pool_width)
    np.testing.assert_allclose(a.pool_attention.sum(1), 1.0, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_features_are_ascending_and_may_be_named_from_the_end(params):
    video = _video(TINY, batch=1)

    @jax.jit
    def run(params, video):
        encoder = VideoEncoder(TINY)
        return [encoder.apply(params, video, return_layers=s) for s in ((0, -1), (0, 1, 2))]

    some, every = run(params, video)
    np.testing.assert_array_equal(some.features, np.asarray(every.features)[[0, 2]])
    np.testing.assert_array_equal(some.features[-1], some.tokens)
    with pytest.raises(ConfigError, match="return_layers"):
        VideoEncoder(TINY).apply(params, video, return_layers=(3,))


def test_wrong_video_size_is_named(params):
    with pytest.raises(ConfigError, match=r"num_frames=4 and image_size=56 need \(B, 4, 56, 56, 3"):
        VideoEncoder(TINY).apply(params, np.zeros((1, 3, 56, 42, 3), np.float32))


def test_bfloat16_stays_near_float32(params):
    narrow = dataclasses.replace(TINY, precision=Precision(compute_dtype="bfloat16"))
    video = _video(TINY)
    wide = jax.jit(VideoEncoder(TINY).apply)(params, video)
    out = jax.jit(VideoEncoder(narrow).apply)(params, video)
    assert out.tokens.dtype == out.pooled.dtype == jnp.bfloat16
    assert out.pool_attention.dtype == jnp.float32
    scale = np.abs(wide.tokens).max()
    np.testing.assert_allclose(out.tokens.astype(np.float32), wide.tokens, atol=0.03 * scale)


IMAGES = {
    "own": {"image_positions": "own"},
    "shared": {"image_positions": "shared"},
    "shared separable": {"image_positions": "shared", "separable_positions": True},
}


@pytest.mark.parametrize("change", IMAGES.values(), ids=IMAGES)
def test_where_an_image_is_placed(change):
    """Own table, the joint one's mean over time, or the spatial one; class row as in clips."""
    config = dataclasses.replace(TINY, **change)
    variables = _init(config)
    params, image = variables["params"], _video(config)[:, :1]
    encoder = VideoEncoder(config)
    embed = jax.jit(lambda video: encoder.apply(variables, video, method="embed"))
    tokens = embed(image)
    # A clip of four times this frame embeds it in each of its frames.
    clip = embed(np.repeat(image, config.num_frames, axis=1))
    if config.separable_positions:
        table = np.concatenate([params["pos_embed_cls"][0], params["pos_embed_spatial"][0]])
        first = np.concatenate(
            [params["pos_embed_cls"][0], table[1:] + params["pos_embed_temporal"][0, :1]]
        )
    else:
        joint = params["pos_embed"][0]
        first = joint[: len(tokens[0])]
        mean = joint[1:].reshape(config.num_frames, -1, config.width).mean(axis=0)
        table = np.concatenate([joint[:1], mean])
        if change["image_positions"] == "own":
            table = params["img_pos_embed"][0]
    wanted = clip[:, : tokens.shape[1]] - first + table
    np.testing.assert_allclose(tokens, wanted, rtol=1e-4, atol=1e-5)


def test_an_images_visible_tokens_are_rows_of_all(params):
    config = dataclasses.replace(TINY, image_positions="shared")
    encoder, image = VideoEncoder(config), _video(config)[:, :1]
    visible = np.array([[0, 2, 3, 16], [0, 1, 8, 9]], np.int32)
    embed = jax.jit(lambda visible: encoder.apply(params, image, visible, method="embed"))
    whole = encoder.apply(params, image, method="embed")
    np.testing.assert_allclose(
        embed(visible), np.take_along_axis(whole, visible[..., None], axis=1), rtol=1e-6
    )


def test_an_image_is_refused_unless_it_has_positions(params):
    image = _video(TINY)[:, :1]
    with pytest.raises(ConfigError, match="set image_positions"):
        VideoEncoder(TINY).apply(params, image)
    shared = dataclasses.replace(TINY, image_positions="shared")
    with pytest.raises(ConfigError, match=r"shape \(2, 2, 56, 56, 3\); num_frames=4"):
        VideoEncoder(shared).apply(params, _video(TINY)[:, :2])


def test_image_tables_start_as_tables_of_one_frame():
    config = dataclasses.replace(TINY, image_positions="own", depth=1)
    variables = jax.jit(VideoEncoder(config).init)(jax.random.key(0), _video(config))
    table = variables["params"]["img_pos_embed"].value
    assert table.shape == (1, 17, config.width)
    np.testing.assert_array_equal(table[0], positions.sincos_3d(32, (1, 4, 4), has_cls=True))


def test_without_a_pool():
    config = dataclasses.replace(TINY, pool=False)
    assert "pool" not in zoo.abstract_params(config)
    out = jax.eval_shape(VideoEncoder(config).apply, _init(config), _video(config))
    assert out.pooled is None
    assert out.pool_attention is None
    assert out.tokens.shape == (2, 65, 32)
