"""Every manifest of the originals: which model it is, and that its file would import whole."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from iv2_jax.interop import entries, families, identify
from iv2_jax.models import zoo
from tests.conftest import SHARED

# Manifests of models of the zoo; of two names for one list of keys the first is found.
MODELS = {
    "autoshot": "autoshot",
    "transnetv2": "transnetv2",
    "chat_bridge_qformer_internvideo2_1b": "bridge_internvideo2_chat",
    "chat_internvideo2_chat_8b": "internvideo2_chat_8b",
    "chat_internvideo2_chat_8b_internlm2_5": "internvideo2_chat_8b_internlm2_5",
    "chat_internvideo2_chat_8b_merged_lora": "internvideo2_chat_8b_merged",
    "multi_beats_iter3": "beats_iter3",
    "multi_clip_1B": "internvideo2_clip_1b",
    "multi_clip_6B": "internvideo2_clip_6b",
    "multi_clip_small_B14": "internvideo2_clip_base",
    "multi_clip_small_L14": "internvideo2_clip_large",
    "multi_clip_small_S14": "internvideo2_clip_small",
    "multi_stage2_audiovisual_1B_hypothetical": "internvideo2_stage2_1b_audiovisual",
    "multi_stage2_audiovisual_6B": "internvideo2_stage2_6b",
    "multi_stage2_visual_1B": "internvideo2_stage2_1b",
    "multi_stage2_visual_1B_retmode": "internvideo2_stage2_1b_retrieval",
    "single_ap_1B_ssv2_f16": "internvideo2_1b_ap_ssv2_f16",
    "single_ap_6B_ssv2_f16": "internvideo2_6b_ap_ssv2_f16",
    "single_cat_1B_ssv2_f16_clsavgNproj_LN": "internvideo2_1b_cat_ssv2_f16",
    "single_cat_6B_ssv2_f16_clsavgNproj_LN": "internvideo2_6b_cat_ssv2_f16",
    "single_distill_B": "internvideo2_base_distill",
    "single_distill_L": "internvideo2_large_distill",
    "single_distill_S": "internvideo2_small_distill",
    "single_finetune_1B_k400_f16": "internvideo2_1b_k400_f16",
    "single_finetune_1B_k400_f8": "internvideo2_1b_k400_f8",
    "single_finetune_1B_k710_f8": "internvideo2_1b_k710_f8",
    "single_finetune_6B_k400_f16": "internvideo2_6b_k400_f16",
    "single_finetune_6B_k400_f8": "internvideo2_6b_k400_f8",
    "single_finetune_6B_k710_f8": "internvideo2_6b_k710_f8",
    "single_finetune_B_k400_f8": "internvideo2_base_k400_f8",
    "single_finetune_L_k400_f8": "internvideo2_large_k400_f8",
    "single_finetune_S_k400_f8": "internvideo2_small_k400_f8",
    "single_pretrain_1B": "internvideo2_1b_pretrain",
    "single_pretrain_6B": "internvideo2_6b_pretrain",
    "single_teacher_internvl_clip_6b": "internvl_6b",
    "single_teacher_iv2_1B": "internvideo2_1b",
    "single_teacher_iv2_6B": "internvideo2_6b",
    "single_teacher_videomaev2_g": "videomaev2_g",
}


def _file(shared_dir, manifest):
    """A file with a manifest's keys, shapes and dtypes, without values."""
    contents = json.loads((shared_dir / "manifests" / f"{manifest}.json").read_text())
    names = {"bfloat16": "bfloat16", "float32": "float32", "int64": "int64"}
    return {
        key: jax.ShapeDtypeStruct(tuple(shape), names.get(str(dtype).split(".")[-1], "float32"))
        for key, (shape, dtype) in contents.items()
    }


@pytest.mark.parametrize("manifest", MODELS)
def test_file_is_known_and_fits_strictly(shared_dir, manifest):
    tensors = _file(shared_dir, manifest)
    best = identify.identify(tensors)[0]
    assert (best.name, best.prefix, best.score) == (MODELS[manifest], "", 1.0)
    config = zoo.get(MODELS[manifest])
    family = families.of(config)
    read, table = family.to_read(config, tensors)
    params = entries.from_torch(read, table, ignore=family.ignorable())
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == sum(
        np.prod(entry.shape) for entry in entries.parameters(table)
    )
    written = entries.to_torch(params, table)
    assert {k: tuple(v.shape) for k, v in written.items()} == {
        k: tuple(v.shape) for k, v in read.items()
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the developers' ../shared folder")
def test_the_others_are_variants_whose_tests_stand_with_their_family():
    there = {path.stem for path in (SHARED / "manifests").glob("*.json")}
    assert there - set(MODELS) == {
        # test_chat_keys.py
        "chat_bridge_videochat2_mistral_stage2",
        "chat_bridge_videochat2_mistral_stage3",
        # test_clip_keys.py
        "multi_clip_1B_peft013_lora",
        "multi_clip_6B_peft013_lora",
        "multi_clip_1B_released_delta_inferred",
        "multi_clip_6B_released_delta_inferred",
        # test_classifier_keys.py
        "single_cat_1B_ssv2_f16_clsavg1_kaimingBN",
        "single_cat_1B_ssv2_f16_clsavg1proj_kaimingBN",
        "single_cat_1B_ssv2_f16_clsavgN_kaimingBN",
        "single_finetune_1B_k400_f8_sep_pos",
    }
