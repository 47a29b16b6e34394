"""A worker's memory stays where it is, however many files it opens."""

from __future__ import annotations

import os

import pytest

from iv2_jax.data import bench, sources
from iv2_jax.data.pipeline import DataConfig
from iv2_jax.data.records import Clip
from tests.data import clips

_LIMIT_MIB = 1536  # P16: a worker
_KINDS = {
    "groups.mp4": {"frames": 30, "options": {"g": "8"}},
    "b.mkv": {"frames": 24, "options": {"bf": "3"}},
    "sound.mp4": {"frames": 20, "audio": True},
    "old.avi": {"frames": 20, "codec": "mpeg4"},
    "turned.mp4": {"frames": 12, "rotation": 90},
}


def _files(folder, count):
    """So many files of several kinds, one in fifty of them broken."""
    made = [clips.write_clip(folder / name, **options) for name, options in _KINDS.items()]
    broken = folder / "broken.mp4"
    broken.write_bytes(made[0].read_bytes()[:700])
    listed = []
    for i in range(count):
        source = broken if i % 50 == 49 else made[i % len(made)]
        path = folder / f"{i}{source.suffix}"
        os.link(source, path)
        listed.append(Clip(str(i), str(path)))
    return sources.FileSource(listed)


def _grown(folder, count):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("memory of a process is read from /proc")
    config = DataConfig(num_frames=4, size=32, bad_clip_log=str(folder / "bad.jsonl"))
    points = list(bench.measure_memory(_files(folder, count), config, count, batch=4))
    assert points[-1].clips >= count
    assert max(point.mib for point in points) < _LIMIT_MIB
    return bench.growth(points)


def test_memory_stays_over_a_few_files(tmp_path):
    assert _grown(tmp_path, 200) < 8


@pytest.mark.slow
def test_memory_stays_over_two_thousand_files(tmp_path):
    assert _grown(tmp_path, 2000) < 8


def test_growth_is_from_the_second_quarter_to_the_last():
    points = [bench.Memory(i, mib) for i, mib in enumerate([5, 90, 100, 102, 103, 103, 109, 109])]
    assert bench.growth(points) == pytest.approx(109 - 101)
