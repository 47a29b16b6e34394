"""Plans compiled for described slices, against the committed figures."""

from __future__ import annotations

import pytest

from iv2_jax.parallel import described
from iv2_jax.parallel.plan import report
from tests.parallel import plan_baseline

BASELINE = plan_baseline.read()


@pytest.fixture(scope="module")
def plan():
    """A tiny stage-1 step on four chips: two replicas, each split over two."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'iv2_jax[tpu]'")
    return plan_baseline.compile_again("tiny")


@pytest.mark.tpu
def test_a_plan_adds_up(plan):
    (step,) = plan.steps
    found = plan.estimates[""]
    assert plan.fits
    assert not found.notes  # compiled and traced FLOPs agree, all loops are known
    assert found.hardware_flops == pytest.approx(step.model_flops, rel=0.03)  # no remat
    held = sum(step.held.values())
    assert held <= step.total_bytes < 16 * 2**30
    # Two Adam moments and a count beside the parameters.
    assert step.held["optimizer state"] == pytest.approx(2 * step.held["parameters"], rel=0.01)
    assert {axis for link in found.links for axis in link.axes} <= {"data", "fsdp"}
    assert plan.cost.steps == 125
    assert "compiled bound" in report.text(plan, sharding=True)


@pytest.mark.tpu
def test_a_small_plan_is_no_worse_than_committed(plan):
    now = plan_baseline.figures(plan.to_dict())
    assert not plan_baseline.worse(now, BASELINE["tiny"]["figures"])


@pytest.mark.pod
@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize("name", [name for name in BASELINE if name != "tiny"])
def test_plans_of_key_configs_are_no_worse_than_committed(name):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'iv2_jax[tpu]'")
    now = plan_baseline.figures(plan_baseline.compile_again(name).to_dict())
    assert not plan_baseline.worse(now, BASELINE[name]["figures"])


def test_worse_is_said_with_its_figures():
    before = {"hbm_bytes": 100.0, "sent_bytes": 100.0}
    now = {"hbm_bytes": 102.0, "sent_bytes": 104.0}
    assert plan_baseline.worse(now, before) == ["sent_bytes: 104, was 100 (+4.0 %)"]


def test_every_committed_plan_has_figures():
    for name, entry in BASELINE.items():
        assert entry["figures"], name
        described.topology(entry["topology"], entry["slices"])
