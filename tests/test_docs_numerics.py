"""docs/numerics.md names flags; each must exist."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
from pathlib import Path

import pytest

DOC = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"

MODULES = {
    "data.dialogue": ("Bos",),
    "data.modalities": ("AudioConfig",),
    "data.pipeline": ("DataConfig",),
    "data.prompts": ("BridgeText", "Template", "get_template"),
    "data.shots": ("scenes",),
    "data.tiles": ("TilingConfig",),
    "data.tokenizers.wordpiece": ("BertTokenizer",),
    "interop.recipes": ("select_classes",),
    "kernels.choice": ("prefer_backend",),
    "models.attention": ("dot_product_attention",),
    "models.audio.beats": ("BeatsConfig",),
    "models.bridge": ("BridgeConfig",),
    "models.chat": ("ChatConfig",),
    "models.classifier": ("ClassifierConfig",),
    "models.clip": ("ClipConfig",),
    "models.decoding": ("GenerationConfig",),
    "models.layers": ("Precision",),
    "models.stage2": ("Stage2Config",),
    "models.student": ("AlignmentConfig", "StudentConfig"),
    "models.teachers.videomae": ("VideoMAEConfig",),
    "models.text.mobileclip": ("MobileClipConfig",),
    "models.video_encoder": ("EncoderConfig",),
    "objectives.contrastive": ("clamp_temperature", "contrastive_loss", "scale_gradient"),
    "objectives.matching": ("matching_loss", "mine_negatives"),
    "objectives.next_token": ("next_token_loss",),
    "train.classify_config": ("MixupConfig",),
    "train.distill": ("DistillConfig", "LossWeights", "MaskConfig"),
    "train.optim": ("OptimizerConfig",),
}
WHERE = {name: module for module, names in MODULES.items() for name in names}

FLAGS = re.compile(r"`(\w+)(?:\.(\w+)|\(([\w=, ]+)\))`")


def _flags():
    """What the last column of the document's tables names."""
    rows = [line for line in DOC.read_text().splitlines() if line.startswith("| ")]
    cells = [row.rstrip(" |").split(" | ")[-1] for row in rows]
    return sorted({match for cell in cells for match in FLAGS.findall(cell)})


def test_the_document_names_flags():
    assert len(_flags()) > 40


@pytest.mark.parametrize("flag", _flags(), ids=lambda flag: ".".join(filter(None, flag)))
def test_flag_exists(flag):
    name, field, keywords = flag
    thing = getattr(importlib.import_module(f"iv2_jax.{WHERE[name]}"), name)
    if keywords:
        names = {keyword.strip() for keyword in keywords.split("=,")}
        names = {keyword.rstrip("=") for keyword in names}
        assert names <= set(inspect.signature(thing).parameters)
    elif isinstance(thing, enum.EnumMeta):
        assert field in thing.__members__
    else:
        assert field in {f.name for f in dataclasses.fields(thing)}


def test_environment_variable():
    from iv2_jax.kernels.choice import ENVIRONMENT

    assert f"`{ENVIRONMENT}`" in DOC.read_text()
