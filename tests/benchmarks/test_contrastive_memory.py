"""The contrastive loss's memory on 64 chips that are not here, and how figures are judged."""

from __future__ import annotations

import jax
import pytest

from benchmarks.contrastive_memory import make_mesh, measure, misses, table

MIB = 2**20


def _figure(batch, chips, size, form="ring"):
    return {
        "batch": batch,
        "chips": chips,
        "kind": "softmax",
        "dtype": "bfloat16",
        "form": form,
        "temp_bytes": size,
    }


def test_goals_are_a_size_and_a_growth():
    fits = [_figure(32768, 64, 39 * MIB), _figure(8 * 32768, 512, 42 * MIB)]
    assert misses(fits) == []
    (too_big,) = misses([_figure(32768, 64, 41 * MIB)])
    assert "41.0 MiB" in too_big
    (grows,) = misses([_figure(4096, 64, 10 * MIB), _figure(32768, 512, 12 * MIB)])
    assert "1.20 times" in grows
    assert misses([_figure(32768, 64, 300 * MIB, "dense")]) == []


def test_the_table_has_a_column_for_each_form():
    figures = [_figure(4096, 64, MIB), _figure(4096, 64, 2 * MIB, "dense")]
    lines = table([*figures, _figure(4096, 512, MIB // 2)]).splitlines()
    assert lines[0].endswith("| dense | ring |")
    assert lines[2] == "| 4 096 | 64 | 64 | softmax | bfloat16 | 2.0 | 1.0 |"
    assert lines[3].endswith("| - | 0.5 |")


@pytest.mark.tpu
def test_ring_on_64_chips():
    """At 32768 rows within its goal, and less than the dense form needs for 4096."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'iv2_jax[tpu]'")
    mesh = make_mesh("v5p", "4x4x4", 16)
    with jax.default_matmul_precision("default"):
        ring = measure(mesh, 32768, "ring", "softmax", "bfloat16")["temp_bytes"]
        dense = measure(mesh, 4096, "dense", "softmax", "bfloat16")["temp_bytes"]
    assert ring < 40 * MIB
    assert ring < dense
