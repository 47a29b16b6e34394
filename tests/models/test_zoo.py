from __future__ import annotations

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
    "internvideo2_1b_pretrain": 1_070_042_752,
    "internvideo2_6b_pretrain": 6_075_947_392,
    "internvideo2_small_distill": 29_169_792,
    "internvideo2_base_distill": 102_252_288,
    "internvideo2_large_distill": 327_183_872,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert zoo.count_params(zoo.get(name)) == COUNTS[name]


def test_every_name_is_counted_or_a_test_model():
    assert {n for n in zoo.names() if not n.startswith("test_")} == set(COUNTS)


def test_unknown_name_gives_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'internvideo2_small'"):
        zoo.get("internvideo2_smal")
