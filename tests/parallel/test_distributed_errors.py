"""Which errors mean that another process is gone."""

from __future__ import annotations

import pytest

from iv2_jax.parallel import distributed


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (_caused(TimeoutError("barrier"), RuntimeError("Task 1 heartbeat timeout")), True),
        (ValueError("shapes do not fit"), False),
        (_caused(ValueError("a"), KeyError("b")), False),
    ],
)
def test_what_tells_of_a_lost_peer(error, lost):
    assert distributed._tells_of_a_lost_peer(error) is lost


@pytest.mark.parametrize(("message", "code"), [("Gloo AllReduce failed", 75), ("a bug", 1)])
def test_a_lost_peer_asks_to_be_started_again_when_no_word_comes(monkeypatch, message, code):
    """The coordination service may have spoken before: then nothing follows."""
    left = []
    monkeypatch.setattr(distributed, "leave", left.append)
    monkeypatch.setattr(distributed.time, "sleep", lambda _: None)
    monkeypatch.setattr(distributed.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    with distributed.leaving_on_error("iv2 train"):
        raise ValueError(message)
    assert left[0] == code
