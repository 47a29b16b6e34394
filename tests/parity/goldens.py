"""Reads golden files: tensors and settings recorded from the original PyTorch code.

A file holds `weights/<torch key>`, `inputs/<name>`, `outputs/<name>`, `grads/<torch key>`, `loss`
and, in its header, the constructor's arguments. Nothing here is tied to the sizes of one set.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.classifier import classifier_map
from iv2_jax.models.classifier import ClassifierConfig
from iv2_jax.models.student import AlignmentConfig, StudentConfig
from iv2_jax.models.video_encoder import EncoderConfig

OUTPUT_LIMIT = 1e-5
LOSS_LIMIT = 1e-5
GRAD_LIMIT = 3e-5


@dataclasses.dataclass(frozen=True)
class Golden:
    """One case. Tensor dicts are keyed without their group's prefix."""

    name: str
    meta: dict
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    loss: np.ndarray | None

    @property
    def video(self) -> np.ndarray:
        """The input video, channels last: `(B, T, H, W, 3)`."""
        return self.inputs["video"].transpose(0, 2, 3, 4, 1)


def read(path: Path) -> Golden:
    """Reads one golden file."""
    groups: dict[str, dict[str, np.ndarray]] = {
        "weights": {},
        "inputs": {},
        "outputs": {},
        "grads": {},
    }
    loss = None
    with safe_open(path, framework="np") as file:
        meta = json.loads(file.metadata()["meta"])
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            group, _, name = key.partition("/")
            if name:
                groups[group][name] = file.get_tensor(key)
            else:
                loss = file.get_tensor(key)
    return Golden(path.stem, meta, **groups, loss=loss)


def relative_error(ours: object, reference: object) -> float:
    """Largest difference over the reference's largest magnitude; shapes must be equal."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"shape {ours.shape}, reference {reference.shape}"
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def assert_close(ours: object, reference: object, limit: float, what: str) -> None:
    """Fails when `relative_error` reaches the limit, or is NaN."""
    error = relative_error(ours, reference)
    assert error < limit, f"{what}: relative error {error:.2e}, limit {limit:.0e}"


def encoder_config(ctor: dict) -> EncoderConfig:
    """Encoder of a stage-1 constructor's arguments, its defaults filled in."""
    return EncoderConfig(
        width=ctor["embed_dim"],
        depth=ctor["depth"],
        num_heads=ctor["num_heads"],
        mlp_width=int(ctor["embed_dim"] * ctor["mlp_ratio"]),
        patch_size=ctor["patch_size"],
        tubelet=ctor.get("tubelet_size", 1),
        image_size=ctor["img_size"],
        num_frames=ctor["num_frames"],
        pool_heads=ctor["attn_pool_num_heads"],
        pool_width=ctor["clip_embed_dim"],
        qkv_bias=ctor.get("qkv_bias", False),
        qk_norm=ctor.get("qk_normalization", True),
        drop_path_rate=ctor["drop_path_rate"],
        separable_positions=ctor.get("sep_pos_embed", False),
        image_positions=_IMAGE_POSITIONS[ctor.get("sep_image_video_pos_embed")],
        tanh_gelu=ctor["use_fused_mlp"],
    )


def student_config(golden: Golden) -> StudentConfig:
    """Student of a `s1_pretrain_*`, `s1_distill_*` or `traj_pretrain` case.

    Widths of teachers are read from the weights (a constructor may leave them to its defaults).
    """
    ctor, weights = golden.meta["ctor"], golden.weights
    unread = set(ctor) - _KNOWN_ARGUMENTS
    assert not unread, f"{golden.name}: unknown constructor arguments {sorted(unread)}"
    depth = ctor["depth"]

    def branch(name: str, has_cls: bool) -> AlignmentConfig | None:
        if f"{name}_decoder.0.norm.weight" not in weights:
            return None
        layers = ctor.get(f"{name}_student_return_index")
        if layers is None:
            interval = ctor.get(f"{name}_student_return_interval", 1)
            count = ctor.get(f"{name}_return_layer", 1)
            layers = sorted({depth - int(i * interval) - 1 for i in range(count)})
        width = len(weights[f"{name}_decoder.0.norm.weight"])
        kind = "linear" if f"{name}_decoder.0.head.weight" in weights else "mlp"
        return AlignmentConfig(width, tuple(layers), kind, has_cls)

    return StudentConfig(
        encoder=encoder_config(ctor),
        clip=branch("clip", has_cls=True),
        mae=branch("mae", has_cls=False),
        final_width=len(weights.get("final_clip_decoder.norm.weight", ())),
        final_decoder="mlp" if "final_clip_decoder.head.0.weight" in weights else "linear",
        normalize="none" not in (ctor.get("clip_norm_type"), ctor.get("mae_norm_type")),
    )


def student_params(golden: Golden, config: StudentConfig) -> dict:
    """Our parameters from the case's weights."""
    entries = torch_keys.student_map(config)
    return torch_keys.from_torch(golden.weights, entries, source=golden.name)


def classifier_config(golden: Golden) -> ClassifierConfig:
    """Classifier of a `s1_finetune*` case or of `traj_finetune_layer_decay`."""
    ctor = golden.meta["ctor"]
    unread = set(ctor) - _KNOWN_ARGUMENTS - {"num_classes", "init_scale"}
    unread -= {"merge_method", "merge_norm", "fc_drop_rate"}
    assert not unread, f"{golden.name}: unknown constructor arguments {sorted(unread)}"
    head = ctor.get("merge_method", "proj")
    if head == "proj":
        head = "ap" if "extra_mlp.0.weight" in golden.weights else "plain"
    return ClassifierConfig(
        encoder=encoder_config(ctor),
        num_classes=len(golden.weights["head.bias"]),
        head=head,
        merge_norm=ctor.get("merge_norm", "LN"),
        head_init_scale=ctor.get("init_scale", 0.001),
    )


def classifier_params(golden: Golden, config: ClassifierConfig) -> dict:
    """Our parameters from the case's weights."""
    return torch_keys.from_torch(golden.weights, classifier_map(config), source=golden.name)


# Only stage 2 takes images; its argument says whether they have a table of their own.
_IMAGE_POSITIONS = {None: "none", False: "shared", True: "own"}

_KNOWN_ARGUMENTS = {
    "attn_pool_num_heads",
    "clip_embed_dim",
    "clip_norm_type",
    "clip_return_layer",
    "clip_student_decoder",
    "clip_student_return_index",
    "clip_student_return_interval",
    "clip_teacher_embed_dim",
    "clip_teacher_final_dim",
    "depth",
    "drop_path_rate",
    "embed_dim",
    "img_size",
    "mae_norm_type",
    "mae_return_layer",
    "mae_student_return_interval",
    "mae_teacher_embed_dim",
    "mlp_ratio",
    "num_frames",
    "num_heads",
    "patch_size",
    "qk_normalization",
    "qkv_bias",
    "sep_image_video_pos_embed",
    "sep_pos_embed",
    "tubelet_size",
    "use_flash_attn",
    "use_fused_mlp",
    "use_fused_rmsnorm",
}
