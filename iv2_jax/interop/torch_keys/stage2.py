"""Table between the stage-2 models' parameters and the original's PyTorch keys, both ways.

Source of the torch names: spec stage2 4 and the manifests of its section 10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iv2_jax.interop.entries import Entry, Rule, build_entries
from iv2_jax.interop.torch_keys import audio, text
from iv2_jax.interop.torch_keys.audio import beats_map
from iv2_jax.interop.torch_keys.rules import dense_rules, norm_rules
from iv2_jax.interop.torch_keys.text import bert_map
from iv2_jax.interop.torch_keys.video import student_map

if TYPE_CHECKING:
    from iv2_jax.models.stage2 import Stage2Config

# What released files hold besides the model.
IGNORABLE: dict[str, str] = {
    **text.IGNORABLE,
    **audio.IGNORABLE,
    r"clip_teacher\..*": "the frozen teacher of the alignment loss, a model of its own",
}

# Axes of the layouts: P pooled vision; D text width; A audio width; J joint width; F two joint
# widths; V vision width; C width of the tokens that the fusion layers read; c two classes.


def stage2_map(config: Stage2Config, *, path_prefix: str = "", key_prefix: str = "") -> list[Entry]:
    """Lists the entries of a stage-2 model (spec stage2 4 and 10).

    Args:
        config: the model's config.
        path_prefix: put before every path of ours.
        key_prefix: put before every torch key.

    Returns:
        Entries: temperature, towers, projections and heads.
    """

    def tower(name: str) -> dict[str, str]:
        return {
            "path_prefix": f"{path_prefix}{name}/",
            "key_prefix": f"{key_prefix}{name}.",
        }

    entries = student_map(config.vision, **tower("vision_encoder"))
    entries += bert_map(config.text, **tower("text_encoder"))
    if config.audio is not None:
        entries += beats_map(config.audio, **tower("audio_encoder"))
    sizes = {
        "P": config.vision.encoder.pool_width,
        "V": config.vision.encoder.width,
        "D": config.text.width,
        "C": config.text.context_width,
        "J": config.joint_width,
        "F": 2 * config.joint_width,
        "c": 2,
    }
    if config.audio is not None:
        sizes["A"] = config.audio.width
    rules = [("temp", "temp", ""), *_joint_rules(config)]
    if config.contrast_bias_init is not None:
        rules.append(("contrast_bias", "contrast_bias", ""))
    return build_entries(rules, sizes, 0, path_prefix, key_prefix) + entries


def _joint_rules(config: Stage2Config) -> list[Rule]:
    """Rules of projections and heads."""
    rules = [
        *dense_rules("vision_proj", "vision_proj", "P", "J"),
        *dense_rules("text_proj", "text_proj", "D", "J"),
        *dense_rules("itm_head", "itm_head", "D", "c"),
    ]
    if config.project_tokens:
        rules += _token_rules("vision", "V")
    if config.audio is not None:
        rules += dense_rules("audio_proj", "audio_proj", "A", "J")
        rules += _token_rules("audio", "A")
    if config.av_fusion:
        rules += dense_rules("fusion", "av_fusion", "F", "J")
    if config.audio_matching:
        rules += dense_rules("atm_head", "atm_head", "D", "c")
    if config.av_matching:
        rules += dense_rules("avtm_head", "avtm_head", "D", "c")
    return rules


def _token_rules(tower: str, axis: str) -> list[Rule]:
    """Rules of the map from a tower's tokens to those that the fusion layers read."""
    path, key = f"{tower}_tokens", f"av_concat_{tower}_proj"
    return dense_rules(f"{path}/fc", f"{key}.0", axis, "C") + norm_rules(
        f"{path}/norm", f"{key}.1", "C"
    )
