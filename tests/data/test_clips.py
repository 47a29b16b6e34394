"""Writing clips for tests leaves the process as it was."""

from __future__ import annotations

import os

import pytest

from tests.data import clips


def _policies() -> set[int]:
    """Scheduling policies of this process's threads."""
    return {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="scheduling policies of Linux")
def test_a_scheduling_policy_that_an_encoder_sets_is_put_back():
    before = _policies()
    with clips.same_priority():
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        assert _policies() != before
    assert _policies() == before
