"""Decay groups, schedules and a six-step run against the original's."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.classifier import classifier_map
from iv2_jax.models.classifier import Classifier, ClassifierConfig
from iv2_jax.models.masking import mask_to_visible
from iv2_jax.models.student import AlignmentConfig, Student, StudentConfig
from iv2_jax.models.video_encoder import EncoderConfig
from iv2_jax.objectives import distillation
from iv2_jax.train import optim
from tests.parity import goldens

TRAJECTORY_LOSS_LIMIT, TRAJECTORY_CHANGE_LIMIT = 2e-5, 2e-3


@pytest.mark.parametrize("case", ["cosine0", "cosine1", "cosine2"])
def test_schedule(golden, case):
    file = golden("lr_and_groups")
    given = file.meta["schedules"][case]
    total = given["epochs"] * given["iters_per_epoch"]
    warmup = given["warmup_epochs"] * given["iters_per_epoch"]
    if given["warmup_steps"] > 0:
        warmup = given["warmup_steps"]
    schedule = optim.cosine_schedule(
        given["base"], given["final"], total, warmup, given["start_warmup_value"]
    )
    ours = [float(schedule(step)) for step in range(total)]
    np.testing.assert_allclose(ours, file.outputs[f"{case}/all_steps"], rtol=2e-6, atol=1e-10)


def _student_of(table: dict[str, list[int]]) -> StudentConfig:
    """A student with the parameters of a table of torch names; head counts do not matter here."""
    patch, rows = table["patch_embed.proj.weight"][-1], table["pos_embed"][1]
    encoder = EncoderConfig(
        width=table["cls_token"][-1],
        depth=sum(name.endswith(".norm1.weight") for name in table if name.startswith("blocks.")),
        num_heads=1,
        mlp_width=table["blocks.0.mlp.fc1.weight"][0],
        patch_size=patch,
        image_size=patch,
        num_frames=rows - 1,
        pool_heads=1,
        pool_width=table["clip_projector.cross_attn.proj.weight"][0],
    )

    def heads(name: str, kind: str, has_cls: bool) -> AlignmentConfig:
        widths = [shape[0] for key, shape in table.items() if key.endswith(".norm.weight")
                  and key.startswith(f"{name}_decoder.")]  # fmt: skip
        return AlignmentConfig(widths[0], tuple(range(-len(widths), 0)), kind, has_cls)

    return StudentConfig(
        encoder=encoder,
        clip=heads("clip", "linear", True),
        mae=heads("mae", "mlp", False),
        final_width=table["final_clip_decoder.norm.weight"][0],
        final_decoder="linear",
    )


def test_decay_groups(golden):
    rows = golden("lr_and_groups").meta["tables"]["pretrain_joint/flat"]
    want = {row["name"]: row["weight_decay"] > 0 for row in rows}
    config = _student_of({row["name"]: row["shape"] for row in rows})
    entries = torch_keys.student_map(config)
    params = torch_keys.from_torch(
        {row["name"]: np.zeros(row["shape"], np.float32) for row in rows}, entries
    )
    decay = optim.decay_multipliers(optim.OptimizerConfig(), params)
    by_path = {optim.path_name(p): m for p, m in jax.tree_util.tree_leaves_with_path(decay)}
    got = {key: by_path[e.path] > 0 for e in entries for key in e.torch_keys}
    assert got == want


def _classifier_of(table: dict[str, list[int]]) -> ClassifierConfig:
    """A classifier with the parameters of a table of torch names, patches of one frame each."""
    patch = table["patch_embed.proj.weight"][-1]
    separable = "pos_embed_spatial" in table
    if separable:
        frames, patches = table["pos_embed_temporal"][1], table["pos_embed_spatial"][1]
    else:
        frames, patches = table["pos_embed"][1] - 1, 1
    encoder = EncoderConfig(
        width=table["cls_token"][-1],
        depth=sum(name.endswith(".norm1.weight") for name in table),
        num_heads=1,
        mlp_width=table["blocks.0.mlp.fc1.weight"][0],
        patch_size=patch,
        image_size=patch * math.isqrt(patches),
        num_frames=frames,
        pool_heads=1,
        pool_width=table["fc_norm.weight"][0],
        separable_positions=separable,
    )
    return ClassifierConfig(encoder, table["head.bias"][0])


def test_layer_decay_groups(golden):
    file = golden("lr_and_groups")
    names = [name for name in file.meta["tables"] if name.endswith("/layer_decay")]
    assert len(names) >= 3
    for table in names:
        rows = file.meta["tables"][table]
        shapes = {row["name"]: row["shape"] for row in rows}
        if "head.weight" in shapes:
            config = _classifier_of(shapes)
            entries = classifier_map(config)
        else:
            config = _student_of(shapes)
            entries = torch_keys.student_map(config)
        params = torch_keys.from_torch(
            {row["name"]: np.zeros(row["shape"], np.float32) for row in rows}, entries
        )
        rules = optim.layer_decay(file.meta["layer_decay"], config.encoder.depth)
        optimizer = optim.OptimizerConfig(lr_multipliers=rules)
        scales = optim.lr_multipliers(optimizer, params)
        scales = jax.tree.map(lambda m, p: np.broadcast_to(m, p.shape), scales, params)
        got = torch_keys.to_torch(scales, entries)
        for row in rows:
            np.testing.assert_allclose(got[row["name"]], row["lr_scale"], rtol=1e-6)
        decay = optim.decay_multipliers(optimizer, params)
        decay = jax.tree.map(lambda m, p: np.full(p.shape, m), decay, params)
        got = torch_keys.to_torch(decay, entries)
        assert {k: bool((v > 0).all()) for k, v in got.items()} == {
            row["name"]: row["weight_decay"] > 0 for row in rows
        }


def test_six_steps_of_the_classifier(golden):
    """Losses, gradient norms and parameter changes with layer decay and label smoothing."""
    case = golden("traj_finetune_layer_decay")
    config, meta = goldens.classifier_config(case), case.meta
    start = jax.tree.map(jnp.asarray, goldens.classifier_params(case, config))
    rates = jnp.asarray(meta["lr_per_step"])
    optimizer = optim.OptimizerConfig(
        b1=meta["betas"][0],
        b2=meta["betas"][1],
        eps=meta["eps"],
        weight_decay=meta["weight_decay"],
        clip_norm=meta["clip_grad_norm"],
        lr_multipliers=optim.layer_decay(meta["layer_decay"], config.encoder.depth),
    )
    tx = optim.make_optimizer(optimizer, lambda step: rates[step], start)
    videos = jnp.asarray(case.inputs["videos"].transpose(0, 1, 3, 4, 5, 2))
    targets = jax.nn.one_hot(case.inputs["labels"], config.num_classes)
    targets = optax.smooth_labels(targets, 0.1)

    def loss_fn(params, video, target):
        logits = Classifier(config).apply({"params": params}, video)
        return optax.softmax_cross_entropy(logits, target).mean()

    @jax.jit
    def step(params, state, video, target):
        loss, grads = jax.value_and_grad(loss_fn)(params, video, target)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads)

    params, state, losses, norms = start, tx.init(start), [], []
    for i in range(meta["steps"]):
        batch = i % len(videos)
        params, state, loss, norm = step(params, state, videos[batch], targets[batch])
        losses.append(float(loss))
        norms.append(float(norm))
    ended = torch_keys.to_torch(jax.device_get(params), classifier_map(config))
    _assert_trajectory(case, losses, norms, ended)


def test_six_steps_of_the_student(golden):
    """Losses, gradient norms and parameter changes of AdamW with clipping, warm-up and cosine."""
    case = golden("traj_pretrain")
    config, meta = goldens.student_config(case), case.meta
    entries = torch_keys.student_map(config)
    start = jax.tree.map(jnp.asarray, goldens.student_params(case, config))
    rates = jnp.asarray(meta["lr_per_step"])
    optimizer = optim.OptimizerConfig(
        b1=meta["betas"][0],
        b2=meta["betas"][1],
        eps=meta["eps"],
        weight_decay=meta["weight_decay"],
        clip_norm=meta["clip_grad_norm"],
    )
    tx = optim.make_optimizer(optimizer, lambda step: rates[step], start)
    videos = jnp.asarray(case.inputs["videos"].transpose(0, 1, 3, 4, 5, 2))

    def loss_fn(params, video, visible, clip, final, mae):
        out = Student(config).apply({"params": params}, video, visible)
        clip = distillation.gather_targets(clip, visible, has_cls=True)
        mae = distillation.gather_targets(mae, visible, has_cls=False)
        return (
            distillation.alignment_loss(out.clip, clip)
            + distillation.final_loss(out.final, final)
            + distillation.alignment_loss(out.mae, mae)
        )

    @jax.jit
    def step(params, state, *batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads)

    params, state, losses, norms = start, tx.init(start), [], []
    names = ("teacher_clip_middle", "teacher_clip_final", "teacher_mae")
    for i in range(meta["steps"]):
        b = i % len(videos)
        visible = jnp.asarray(mask_to_visible(case.inputs["masks"][b]))
        targets = [jnp.asarray(case.inputs[name][b]) for name in names]
        params, state, loss, norm = step(params, state, videos[b], visible, *targets)
        losses.append(float(loss))
        norms.append(float(norm))

    ended = torch_keys.to_torch(jax.device_get(params), entries)
    _assert_trajectory(case, losses, norms, ended)


def _assert_trajectory(case, losses, norms, ended):
    """Losses, gradient norms and how far each recorded parameter went."""
    assert np.abs(losses - case.outputs["losses"]).max() < TRAJECTORY_LOSS_LIMIT
    goldens.assert_close(norms, case.outputs["grad_norms_before_clip"], 1e-4, "gradient norms")
    for name, final in case.outputs.items():
        if name.startswith("final/"):
            key = name.removeprefix("final/")
            goldens.assert_close(
                ended[key] - case.weights[key],
                final - case.weights[key],
                TRAJECTORY_CHANGE_LIMIT,
                f"change of {key}",
            )
