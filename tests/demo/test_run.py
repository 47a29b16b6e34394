"""What the demo says first."""

from __future__ import annotations

from iv2_jax.demo.run import headline


def about(classes, train_clips):
    return {"classes": [str(i) for i in range(classes)], "train_clips": train_clips}


def test_headline_is_what_needs_motion_where_it_can_be_learned():
    many, few = about(3, 300), about(72, 103)
    assert headline({"topic": many, "action": many, "game": many}) == "action"
    assert headline({"topic": about(12, 103), "action": few}) == "topic"
    assert headline({"b": few, "a": about(4, 8)}) == "a"
