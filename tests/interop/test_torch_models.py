"""Our PyTorch modules against the Flax models: alignments on other grids, masks, all options."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.interop import torch_keys
from iv2_jax.models.masking import mask_to_visible
from iv2_jax.models.student import AlignmentConfig, Student, StudentConfig
from iv2_jax.models.video_encoder import EncoderConfig, VideoEncoder

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the torch extra")
from iv2_jax.interop.torch_models import video as torch_models  # noqa: E402 (needs torch)

ENCODER = EncoderConfig(
    32,
    3,
    4,
    48,
    patch_size=7,
    image_size=28,
    num_frames=4,
    tubelet=2,
    pool_heads=4,
    pool_width=24,
    layer_scale_init=0.5,
)


def _params(entries, seed=0):
    rng = np.random.default_rng(seed)
    abstract = torch_keys.abstract_params(entries)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4") * 0.3, abstract)


def _state(params, entries):
    return {
        key: torch.from_numpy(np.array(value))
        for key, value in torch_keys.to_torch(params, entries).items()
    }


def _video(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 4, 28, 28, 3)).astype(np.float32)


def _mask(hidden, seed=0):
    """Hides `hidden` patches of each clip, never the class token."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((2, ENCODER.num_tokens), bool)
    for row in mask:
        row[1 + rng.permutation(ENCODER.num_patches)[:hidden]] = True
    return mask


def _close(theirs, ours):
    np.testing.assert_allclose(theirs.detach().numpy(), np.asarray(ours), rtol=2e-4, atol=2e-5)


def _channels_first(video):
    return torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())


OTHER_OPTIONS = {
    "separable_positions": True,
    "qk_norm": False,
    "qkv_bias": True,
    "tanh_gelu": False,
}


@pytest.mark.parametrize("options", [{}, OTHER_OPTIONS], ids=["default", "other options"])
def test_encoder(options):
    config = dataclasses.replace(ENCODER, **options)
    entries = torch_keys.encoder_map(config)
    params = _params(entries)
    contents = {"kind": "encoder", "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents)
    model.load_state_dict(_state(params, entries))
    apply = jax.jit(VideoEncoder(config).apply, static_argnames="return_layers")
    for mask in (None, _mask(20)):
        visible = None if mask is None else mask_to_visible(mask)
        ours = apply({"params": params}, _video(), visible, return_layers=(0, 2))
        theirs = model.encode(
            _channels_first(_video()), None if mask is None else torch.from_numpy(mask), (0, 2)
        )
        _close(theirs.tokens, ours.tokens)
        _close(theirs.pooled, ours.pooled)
        _close(theirs.pool_attention, ours.pool_attention)
        _close(torch.stack(theirs.features), ours.features)
    whole = model.encode(_channels_first(_video()))
    assert torch.equal(model(_channels_first(_video())), whole.pooled)


@pytest.mark.parametrize(
    ("grid", "has_cls", "hidden"),
    [
        (None, False, 25),
        ((2, 4, 4), True, 25),  # the student's own, written out
        ((2, 3, 3), True, 25),
        ((1, 2, 5), False, 29),
        ((4, 7, 7), True, 0),
    ],
)
def test_student_on_other_grids(grid, has_cls, hidden):
    config = StudentConfig(
        encoder=ENCODER,
        clip=AlignmentConfig(12, (-3, -1), "linear", has_cls, grid),
        mae=AlignmentConfig(10, (1,), "mlp", False, grid),
        final_width=6,
        final_decoder="linear",
        normalize=False,
    )
    entries = torch_keys.student_map(config)
    params = _params(entries)
    contents = {"kind": "student", "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents, fused_attention=False)
    model.load_state_dict(_state(params, entries))
    mask = _mask(hidden)
    ours = jax.jit(Student(config).apply)({"params": params}, _video(), mask_to_visible(mask))
    theirs = model(_channels_first(_video()), torch.from_numpy(mask))
    _close(theirs.clip, ours.clip)
    _close(theirs.mae, ours.mae)
    _close(theirs.final, ours.final)
    for name in ("clip_weight", "mae_weight"):
        weight, reference = getattr(theirs, name), getattr(ours, name)
        assert (weight is None) == (reference is None)
        if weight is not None:
            np.testing.assert_array_equal(weight.numpy(), reference)
    if hidden == 0:
        _close(model(_channels_first(_video())).clip, ours.clip)


def test_preprocessing_is_ours():
    from iv2_jax.interop.preprocessing import video as preprocessing_spec
    from iv2_jax.pixels import normalize

    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 3, 5, 3)).astype(np.uint8)
    theirs = torch_models.preprocess(torch.from_numpy(frames), preprocessing_spec(ENCODER))
    ours = np.asarray(normalize(frames)).transpose(0, 4, 1, 2, 3)
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-5, atol=1e-6)


def test_drop_path_drops_whole_samples_and_only_in_training():
    drop = torch_models.DropPath(0.25)
    torch.manual_seed(0)
    ones = torch.ones(4000, 2, 3)
    kept = drop.train()(ones)
    values = {round(v, 4) for v in kept.unique().tolist()}
    assert values == {0.0, round(1 / 0.75, 4)}
    assert (kept.flatten(1) == kept[:, :1, 0]).all()
    assert abs(kept.mean() - 1) < 0.05
    assert drop.eval()(ones) is ones


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'decoder'"):
        torch_models.from_config({"kind": "decoder", "model": {}})


@pytest.mark.parametrize(
    ("images", "separable", "grid"),
    [
        ("own", False, None),
        ("shared", False, None),
        ("shared", True, None),
        ("own", False, (4, 3, 3)),
    ],
)
def test_images(images, separable, grid):
    """One frame in place of four, all tokens or some, own table or the clips' (spec stage2 2)."""
    encoder = dataclasses.replace(
        ENCODER, tubelet=1, image_positions=images, separable_positions=separable
    )
    clip = AlignmentConfig(20, (1, 2), "linear", has_cls=True, grid=grid)
    config = StudentConfig(encoder, clip, None, 12, "linear")
    entries = torch_keys.student_map(config)
    params = _params(entries)
    model = torch_models.from_config({"kind": "student", "model": config_lib.to_dict(config)})
    model.load_state_dict(_state(params, entries))
    apply = jax.jit(Student(config).apply)
    image = _video()[:, :1]
    mask = np.zeros((2, 17), bool)
    mask[0, [1, 5, 9]] = mask[1, [2, 3, 16]] = True
    for hidden in (None, mask):
        visible = None if hidden is None else mask_to_visible(hidden)
        ours = apply({"params": params}, image, visible)
        theirs = model(_channels_first(image), None if hidden is None else torch.from_numpy(hidden))
        for name in ("tokens", "pooled", "clip", "final"):
            _close(getattr(theirs, name), getattr(ours, name))
        assert (ours.clip_weight is None) == (grid is None)
        if grid is not None:
            _close(theirs.clip_weight, ours.clip_weight)


def test_encoder_without_pool():
    config = dataclasses.replace(ENCODER, pool=False)
    entries = torch_keys.encoder_map(config)
    params = _params(entries)
    model = torch_models.from_config({"kind": "encoder", "model": config_lib.to_dict(config)})
    model.load_state_dict(_state(params, entries))
    ours = jax.jit(VideoEncoder(config).apply)({"params": params}, _video())
    theirs = model.encode(_channels_first(_video()))
    _close(theirs.tokens, ours.tokens)
    assert theirs.pooled is ours.pooled is ours.pool_attention is None
