"""Table between our video models' parameters and the original's PyTorch keys, used both ways.

A rule is (path of ours, torch key, layout); `entries` explains layouts and converts. A `{}` in a
torch key numbers the slices of our leading axis. Source of the torch names: spec stage1 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iv2_jax.interop.entries import Entry, Rule, build_entries
from iv2_jax.interop.torch_keys.rules import dense_rules, norm_rules

if TYPE_CHECKING:
    from iv2_jax.models.student import StudentConfig
    from iv2_jax.models.teachers.videomae import VideoMAEConfig
    from iv2_jax.models.video_encoder import EncoderConfig

# What released checkpoints hold beside the encoder, for those who want the encoder alone.
HEADS = {
    r"(clip_|mae_|img_|clip_img_)pos_embed.*": "positions of alignment heads and images",
    r"(clip|mae|final_clip)_decoder\..*": "alignment decoders",
    r"(fc_norm|head|extra_mlp|down|down_norm)\..*": "classifier",
}

# Axes of the layouts: D width; N tokens with CLS, L without; S patches of a frame; I tokens of an
# image with CLS; T temporal
# slots; t y x c axes of a patch; s one of q, k, v; h d heads and head width; M MLP width; p e heads
# and head width of the pool; P pooled width; C target width.


def encoder_map(
    config: EncoderConfig, *, path_prefix: str = "", key_prefix: str = ""
) -> list[Entry]:
    """Lists the entries of the video encoder with its attention pool (spec stage1 2 and 8).

    Args:
        config: the encoder's config; also that of the InternVL tower (`num_frames=1`).
        path_prefix: put before every path of ours, such as `encoder/`.
        key_prefix: put before every torch key, such as `vision_encoder.`.

    Returns:
        Entries in the order of the original's modules.
    """
    rules = [
        ("cls_token", "cls_token", "1 1 D"),
        *_position_rules("pos_embed", config, with_cls=True),
        ("patch_embed/kernel", "patch_embed.proj.weight", "t y x c D -> D c t y x"),
        ("patch_embed/bias", "patch_embed.proj.bias", "D"),
    ]
    block = [
        ("norm1/scale", "norm1.weight", "D"),
        ("attn/qkv/kernel", "attn.qkv.weight", "D s h d -> (s h d) D"),
        *([("attn/qkv/bias", "attn.qkv.bias", "s h d -> (s h d)")] if config.qkv_bias else []),
        ("attn/proj/kernel", "attn.proj.weight", "h d D -> D (h d)"),
        ("attn/proj/bias", "attn.proj.bias", "D"),
        *([("attn/q_norm/scale", "attn.q_norm.weight", "D")] if config.qk_norm else []),
        *([("attn/k_norm/scale", "attn.k_norm.weight", "D")] if config.qk_norm else []),
        ("ls1/gamma", "ls1.gamma", "D"),
        ("norm2/scale", "norm2.weight", "D"),
        *dense_rules("mlp/fc1", "mlp.fc1", "D", "M"),
        *dense_rules("mlp/fc2", "mlp.fc2", "M", "D"),
        ("ls2/gamma", "ls2.gamma", "D"),
    ]
    rules += [(f"blocks/{path}", f"blocks.{{}}.{key}", layout) for path, key, layout in block]
    if config.pool:
        rules += _pool_rules()
    return build_entries(rules, _encoder_sizes(config), config.depth, path_prefix, key_prefix)


def _pool_rules() -> list[Rule]:
    """Rules of the attentive pool, the original's "clip_projector" (spec stage1 2.5)."""
    rules = []
    for name in "qkv":
        rules += norm_rules(f"pool/norm_{name}", f"clip_projector.norm1_{name}", "D")
    for name in "qkv":
        key = f"clip_projector.cross_attn.{name}"
        rules += [
            (f"pool/{name}/bias", f"{key}_bias", "p e -> (p e)"),
            (f"pool/{name}/kernel", f"{key}.weight", "D p e -> (p e) D"),
        ]
    return [
        *rules,
        ("pool/proj/kernel", "clip_projector.cross_attn.proj.weight", "p e P -> P (p e)"),
        ("pool/proj/bias", "clip_projector.cross_attn.proj.bias", "P"),
    ]


def student_map(
    config: StudentConfig, *, path_prefix: str = "", key_prefix: str = ""
) -> list[Entry]:
    """Lists the entries of a student: stage 1 (spec stage1 3.2, 5, 8) or stage 2 (stage2 2).

    Args:
        config: the student's config.
        path_prefix: put before every path of ours, such as `vision/`.
        key_prefix: put before every torch key, such as `vision_encoder.`.

    Returns:
        Entries: the encoder's first, then those of each alignment.
    """
    encoder = config.encoder
    prefixes = (path_prefix, key_prefix)
    entries = encoder_map(encoder, path_prefix=f"{path_prefix}encoder/", key_prefix=key_prefix)
    for name, branch in (("clip", config.clip), ("mae", config.mae)):
        if branch is None:
            continue
        rules = _position_rules(f"{name}_pos_embed", encoder, with_cls=branch.has_cls)
        entries += build_entries(rules, _encoder_sizes(encoder), 0, *prefixes)
        rules = _decoder_rules(f"{name}_decoder", f"{name}_decoder.{{}}", branch.decoder)
        sizes = {"D": encoder.width, "C": branch.width}
        entries += build_entries(rules, sizes, len(branch.layers), *prefixes)
    if config.final_width:
        rules = _decoder_rules("final_clip_decoder", "final_clip_decoder", config.final_decoder)
        final = {"D": encoder.pool_width, "C": config.final_width}
        entries += build_entries(rules, final, 0, *prefixes)
    return entries


def videomae_map(config: VideoMAEConfig, *, key_prefix: str = "") -> list[Entry]:
    """Lists the entries of the VideoMAEv2 teacher (spec stage1 4.2 and 8).

    Args:
        config: the teacher's config.
        key_prefix: put before every torch key; the original file has `encoder.`.

    Returns:
        Entries in the order of the original's modules.
    """
    rules = [
        ("patch_embed/kernel", "patch_embed.proj.weight", "t y x c D -> D c t y x"),
        ("patch_embed/bias", "patch_embed.proj.bias", "D"),
    ]
    block = [
        *norm_rules("norm1", "norm1", "D"),
        ("attn/q_bias", "attn.q_bias", "h d -> (h d)"),
        ("attn/v_bias", "attn.v_bias", "h d -> (h d)"),
        ("attn/qkv/kernel", "attn.qkv.weight", "D s h d -> (s h d) D"),
        ("attn/proj/kernel", "attn.proj.weight", "h d D -> D (h d)"),
        ("attn/proj/bias", "attn.proj.bias", "D"),
        *norm_rules("norm2", "norm2", "D"),
        *dense_rules("mlp/fc1", "mlp.fc1", "D", "M"),
        *dense_rules("mlp/fc2", "mlp.fc2", "M", "D"),
    ]
    rules += [(f"blocks/{path}", f"blocks.{{}}.{key}", layout) for path, key, layout in block]
    rules += norm_rules("norm", "norm", "D")
    return build_entries(rules, _trunk_sizes(config), config.depth, "", key_prefix)


def _encoder_sizes(config: EncoderConfig) -> dict[str, int]:
    """Axis sizes of the encoder's layouts."""
    frames, rows, columns = config.grid
    return _trunk_sizes(config) | {
        "N": 1 + frames * rows * columns,
        "L": frames * rows * columns,
        "S": rows * columns,
        "I": 1 + rows * columns,
        "T": frames,
        "p": config.pool_heads,
        "e": config.width // config.pool_heads,
        "P": config.pool_width,
    }


def _trunk_sizes(config: EncoderConfig | VideoMAEConfig) -> dict[str, int]:
    """Axis sizes shared by the encoder and VideoMAE."""
    return {
        "D": config.width,
        "M": config.mlp_width,
        "h": config.num_heads,
        "d": config.width // config.num_heads,
        "s": 3,
        "t": config.tubelet,
        "y": config.patch_size,
        "x": config.patch_size,
        "c": 3,
    }


def _position_rules(name: str, config: EncoderConfig, *, with_cls: bool) -> list[Rule]:
    """Rules of a joint or separable position table and of the one for images."""
    if config.separable_positions:
        rules = [
            (f"{name}_spatial", f"{name}_spatial", "1 S D"),
            (f"{name}_temporal", f"{name}_temporal", "1 T D"),
        ]
        return rules + ([(f"{name}_cls", f"{name}_cls", "1 1 D")] if with_cls else [])
    rules = [(name, name, "1 N D" if with_cls else "1 L D")]
    if config.image_positions == "own":
        image = name.removesuffix("pos_embed") + "img_pos_embed"
        rules.append((image, image, "1 I D" if with_cls else "1 S D"))
    return rules


def _decoder_rules(path: str, key: str, kind: str) -> list[Rule]:
    """Rules of an alignment decoder, `linear` or `mlp` (spec stage1 3.2)."""
    if kind == "linear":
        dense = dense_rules(f"{path}/fc", f"{key}.head", "D", "C")
    else:
        dense = dense_rules(f"{path}/fc1", f"{key}.head.0", "D", "D'")
        dense += dense_rules(f"{path}/fc2", f"{key}.head.2", "D", "C")
    return dense + norm_rules(f"{path}/norm", f"{key}.norm", "C")
