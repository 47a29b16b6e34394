"""Loads that put a model together from checkpoints of others: what the training recipes start from.

Each takes parameter trees (as `load.load_params` and `init` give them) with the configs they belong
to, and returns a new tree for the target's config. All are strict: whatever is left out, resized or
taken from elsewhere is named in the function's text, and the result has exactly the parameters and
shapes of the target, else `CheckpointError` lists what does not fit. Arrays are not copied unless
they change. LoRA adapters are merged by `models.lora`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from iv2_jax.errors import ConfigError
from iv2_jax.interop.fitting import (
    INFLATIONS,
    TABLE,
    Params,
    check,
    checked,
    cut_encoder,
    fit_encoder,
    fit_tables,
    inflate_patch_embed,
    resize_positions,
)
from iv2_jax.interop.torch_keys.classifier import classifier_map
from iv2_jax.interop.torch_keys.video import student_map
from iv2_jax.models.classifier import ClassifierConfig
from iv2_jax.models.student import StudentConfig
from iv2_jax.models.video_encoder import EncoderConfig

__all__ = [
    "INFLATIONS",
    "classifier_to_classifier",
    "cut_encoder",
    "fit_encoder",
    "inflate_patch_embed",
    "pretrained_to_classifier",
    "resize_positions",
    "select_classes",
    "stage1_to_stage2_vision",
    "stage2_overlay_to_classifier",
    "student_to_chat_vision",
    "student_to_clip_vision",
]


def pretrained_to_classifier(
    params: Mapping[str, Any],
    source: StudentConfig,
    target: ClassifierConfig,
    fresh: Mapping[str, Any],
) -> Params:
    """A classifier that starts from a stage-1 or distilled student (spec stage1 6.3-6.5).

    The student's decoders and their positions are dropped; the encoder is fitted to the target
    (`fit_encoder`); the head is `fresh`.

    Args:
        params: the student's parameters.
        source: the student's config.
        target: the classifier's config.
        fresh: newly initialised parameters of the classifier.

    Returns:
        The classifier's parameters.

    Raises:
        CheckpointError: something is missing, left over or of another shape.
        ConfigError: the encoders differ in more than frames, image size and images.
    """
    check(params, student_map(source), "the student's parameters")
    encoder = fit_encoder(params["encoder"], source.encoder, target.encoder)
    return checked({**fresh, "encoder": encoder}, classifier_map(target), "the classifier")


def stage2_overlay_to_classifier(
    stage1: Mapping[str, Any],
    stage1_config: StudentConfig,
    stage2: Mapping[str, Any],
    stage2_config: StudentConfig,
    target: ClassifierConfig,
    fresh: Mapping[str, Any],
) -> Params:
    """A classifier from the "s1 + s2 overlay" of the probing recipes (spec stage1 6.4).

    The stage-1 encoder is overwritten by every parameter of the stage-2 vision encoder's, its
    positions of (usually) 4 frames included, which are then interpolated to the target's. Decoders
    and image tables of both are dropped; the head is `fresh`.

    Args:
        stage1: parameters of the stage-1 student.
        stage1_config: its config.
        stage2: parameters of the stage-2 vision encoder, a student too.
        stage2_config: its config.
        target: the classifier's config.
        fresh: newly initialised parameters of the classifier.

    Returns:
        The classifier's parameters.

    Raises:
        CheckpointError: a stage-2 parameter has no stage-1 counterpart of its shape (positions may
            differ), or the result does not fit the target.
        ConfigError: the encoders differ in more than frames, image size and images.
    """
    check(stage1, student_map(stage1_config), "the stage-1 parameters")
    check(stage2, student_map(stage2_config), "the stage-2 parameters")
    # Both are brought to the target first: then names and shapes must agree one by one.
    base = fit_encoder(stage1["encoder"], stage1_config.encoder, target.encoder)
    over = fit_encoder(stage2["encoder"], stage2_config.encoder, target.encoder)
    encoder = traverse_util.unflatten_dict(
        traverse_util.flatten_dict(base) | traverse_util.flatten_dict(over)
    )
    return checked({**fresh, "encoder": encoder}, classifier_map(target), "the classifier")


def classifier_to_classifier(
    params: Mapping[str, Any],
    source: ClassifierConfig,
    target: ClassifierConfig,
    *,
    rows: Sequence[int] | None = None,
    fresh: Mapping[str, Any] | None = None,
) -> Params:
    """A classifier that starts from another: K710 to K400/600/700, 8 to 16 frames, new classes.

    The encoder is fitted to the target (`fit_encoder`). The last map keeps the chosen `rows`, or
    comes from `fresh`, or stays if neither is given.

    Args:
        params: the source's parameters.
        source: the source's config.
        target: the target's config; its head is of the same kind.
        rows: for each target class, its row in the source's head: `range(400)` for Kinetics-400 of
            a K710 head, the lists `label_mixto600.json` and `label_mixto700.json` for the others.
        fresh: newly initialised parameters of the target, whose last map is taken.

    Returns:
        The target's parameters.

    Raises:
        CheckpointError: something is missing, left over or of another shape.
        ConfigError: `rows` and `fresh` are both given, `rows` do not fit, or the encoders differ in
            more than frames, image size and images.
    """
    check(params, classifier_map(source), "the source's parameters")
    if rows is not None and fresh is not None:
        raise ConfigError("rows and fresh are both given: the head has one source")
    if rows is not None:
        if len(rows) != target.num_classes:
            raise ConfigError(f"{len(rows)} rows for num_classes={target.num_classes}")
        params = select_classes(params, rows)
    out = {**params, "encoder": fit_encoder(params["encoder"], source.encoder, target.encoder)}
    if fresh is not None:
        out["head"] = fresh["head"]
    return checked(out, classifier_map(target), "the classifier")


def select_classes(params: Mapping[str, Any], rows: Sequence[int]) -> Params:
    """Keeps some classes of a classifier's head, in the order of `rows`.

    Args:
        params: the classifier's parameters.
        rows: row of each kept class in the given head.

    Returns:
        Parameters with `len(rows)` classes.

    Raises:
        ConfigError: a row is not in the head.
    """
    head = params["head"]
    index, classes = np.asarray(rows, np.int64), np.shape(head["bias"])[0]
    wrong = [int(row) for row in index if not 0 <= row < classes]
    if wrong:
        raise ConfigError(f"rows {wrong[:5]} are not in the head, which has {classes} classes")
    return {**params, "head": {"kernel": head["kernel"][:, index], "bias": head["bias"][index]}}


def stage1_to_stage2_vision(
    params: Mapping[str, Any], source: StudentConfig, target: StudentConfig
) -> Params:
    """The stage-2 vision encoder that starts from a stage-1 student (spec stage2 2).

    The video teacher's decoders and positions are dropped. `pos_embed` and `clip_pos_embed` are
    interpolated (8 to 4 frames in the recipes). Tables for images, where the target has them,
    start from the sine-cosine table of one frame, not from the learned ones.

    Args:
        params: the stage-1 student's parameters.
        source: its config.
        target: the stage-2 encoder's config, a student without `mae`.

    Returns:
        The stage-2 encoder's parameters.

    Raises:
        CheckpointError: something is missing, left over or of another shape.
        ConfigError: the encoders differ in more than frames, image size and images.
    """
    check(params, student_map(source), "the stage-1 parameters")
    out = {name: value for name, value in params.items() if not name.startswith("mae_")}
    out["encoder"] = fit_encoder(params["encoder"], source.encoder, target.encoder)
    tables = {name: out.pop(name) for name in list(out) if TABLE.fullmatch(name)}
    out |= fit_tables(tables, source.encoder, target.encoder, "clip_pos_embed")
    return checked(out, student_map(target), "the stage-2 vision encoder")


def student_to_clip_vision(
    params: Mapping[str, Any], source: StudentConfig, target: EncoderConfig
) -> Params:
    """The CLIP vision encoder of a stage-2 encoder or a distilled student (spec stage2 7.4).

    Decoders and their positions are dropped, tables for images too, and `pos_embed` is
    interpolated over time where the frames differ (4 to 8 for the 1B and 6B, none for S, B, L).

    Args:
        params: parameters of the stage-2 vision encoder or distilled student.
        source: its config.
        target: the CLIP vision encoder's config.

    Returns:
        The encoder's parameters.

    Raises:
        CheckpointError: something is missing, left over or of another shape.
        ConfigError: the encoders differ in more than frames, image size and images.
    """
    check(params, student_map(source), "the student's parameters")
    return fit_encoder(params["encoder"], source.encoder, target)


def student_to_chat_vision(
    params: Mapping[str, Any], source: StudentConfig, target: EncoderConfig
) -> Params:
    """The chat model's vision encoder: the first blocks of a stage-2 encoder (spec stage3 2).

    Decoders, the pool and the last block (39 of 40 are kept) are dropped; the table for images is
    kept; `pos_embed` is interpolated over time where the frames differ.

    Args:
        params: parameters of the stage-2 vision encoder.
        source: its config.
        target: config of the chat model's encoder: less `depth`, `pool=False`.

    Returns:
        The encoder's parameters.

    Raises:
        CheckpointError: something is missing, left over or of another shape.
        ConfigError: the target has more blocks than the source, or differs otherwise.
    """
    check(params, student_map(source), "the student's parameters")
    between = dataclasses.replace(source.encoder, depth=target.depth, pool=target.pool)
    cut = cut_encoder(params["encoder"], source.encoder, between)
    return fit_encoder(cut, between, target)
