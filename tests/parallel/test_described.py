"""Described slices leave the process as it was."""

from __future__ import annotations

import os

import pytest

from iv2_jax.parallel import described


def _policies() -> set[int]:
    """Scheduling policies of this process's threads."""
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="scheduling policies of Linux")
def test_a_scheduling_policy_that_is_set_inside_is_put_back():
    before = _policies()
    with described._same_priority():
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        assert _policies() != before
    assert _policies() == before == {os.SCHED_OTHER}


@pytest.mark.tpu
def test_the_tpu_compiler_gets_no_real_time_priority():
    """Some releases of libtpu take SCHED_FIFO as root, before which all else would wait."""
    pytest.importorskip("libtpu")
    assert len(described.topology("v5e:2x2").devices()) == 4
    assert _policies() == {os.SCHED_OTHER}
