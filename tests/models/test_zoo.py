from __future__ import annotations

import subprocess
import sys

import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.models import zoo

# Counts of the released classes built without memory (spec stage1 section 1).
COUNTS = {
    "internvideo2_small": 23_043_840,
    "internvideo2_base": 89_438_976,
    "internvideo2_large": 308_929_280,
    "internvideo2_1b": 1_020_708_608,
    "internvideo2_6b": 5_941_735_168,
    "internvl_6b": 5_936_000_768,
    "videomaev2_g": 1_011_610_752,
    "internvideo2_1b_pretrain": 1_070_042_752,
    "internvideo2_6b_pretrain": 6_075_947_392,
    "internvideo2_small_distill": 29_169_792,
    "internvideo2_base_distill": 102_252_288,
    "internvideo2_large_distill": 327_183_872,
    "internvideo2_small_k400_f8": 23_352_976,
    "internvideo2_base_k400_f8": 89_748_112,
    "internvideo2_large_k400_f8": 309_238_416,
    "internvideo2_1b_k400_f8": 1_021_017_744,
    "internvideo2_6b_k400_f8": 5_942_044_304,
    "internvideo2_1b_k710_f8": 1_021_256_134,
    "internvideo2_6b_k710_f8": 5_942_282_694,
    "internvideo2_1b_k400_f16": 1_023_901_328,
    "internvideo2_6b_k400_f16": 5_948_597_904,
    "internvideo2_1b_ap_ssv2_f16": 1_028_451_502,
    "internvideo2_6b_ap_ssv2_f16": 5_953_148_078,
    "internvideo2_1b_cat_ssv2_f16": 1_027_082_926,
    "internvideo2_6b_cat_ssv2_f16": 5_953_155_758,
    # Spec stage2, section 0.
    "internvideo2_stage2_1b": 1_410_146_493,
    "internvideo2_stage2_6b": 6_453_900_079,
    "bert_large_stage2_1b": 360_108_858,
    "bert_large_stage2_6b": 353_555_258,
    "beats_iter3": 90_311_792,
    "llama_clip_7b_text": 6_684_028_928,
    "mobileclip_b_text": 63_428_096,
    "internvideo2_clip_1b": 7_704_737_537,
    "internvideo2_clip_6b": 12_625_764_097,
    "internvideo2_clip_small": 86_867_201,
    "internvideo2_clip_base": 153_262_337,
    "internvideo2_clip_large": 372_752_641,
    # Spec stage3 9, less the 512 position ids that the original counts among the parameters.
    "mistral_7b": 7_248_023_552,
    "mistral_7b_lora": 7_248_023_552 + 42_532_864,
    "bridge_internvideo2_chat": 192_033_536 - 512,
    "internvideo2_chat_8b": 8_471_369_472 - 512,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert zoo.count_params(zoo.get(name)) == COUNTS[name]


def test_heavy_families_are_imported_only_when_they_are_asked_for():
    code = (
        "import sys; from iv2_jax.models import zoo; zoo.get('internvideo2_1b')\n"
        "assert not {'iv2_jax.models.llm', 'iv2_jax.models.chat'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_two_models_have_one_name():
    assert len(set(zoo.names())) == len(zoo.names())


def test_families():
    assert zoo.family("internvideo2_1b") == "encoder"
    assert zoo.family("test_tiny_chat") == "chat"
    with pytest.raises(ConfigError, match="no config of a model"):
        zoo.abstract_params({"width": 3})


def test_every_counted_name_is_there():
    assert set(COUNTS) <= set(zoo.names())


def test_unknown_name_gives_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'internvideo2_small'"):
        zoo.get("internvideo2_smal")
