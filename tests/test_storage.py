"""Workdirs in a bucket, with fsspec's memory in place of Google's service; checkpoints' arrays,
which TensorStore writes by itself, are not part of it."""

from __future__ import annotations

import sys
import types

import fsspec
import jax
import jax.numpy as jnp
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from iv2_jax import storage
from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.train import checkpoint, goodput, metrics, profiling


class Bucket(MemoryFileSystem):
    """Objects in memory under gs://."""

    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).split("://")[-1].strip("/")


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", types.ModuleType("gcsfs"))
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    Bucket.clear_instance_cache()
    yield storage.path("gs://bucket/run")
    Bucket.store.clear()


def test_a_run_s_files_in_a_bucket(bucket):
    checkpoint.check_writable(bucket)
    assert list(bucket.iterdir()) == []

    for first, last in ((0, 3), (2, 4)):  # the second start goes on from step 2
        writer = metrics.MetricWriter(bucket, 4, first)
        for step in range(first + 1, last + 1):
            writer.write(step, {"loss": 1.0 / step})
        writer.close()
    assert [line["step"] for line in metrics.read_metrics(bucket)] == [1, 2, 3, 4]
    assert any((bucket / "tensorboard").iterdir())

    for _ in range(2):
        goodput.Goodput(bucket).write()
    assert len(goodput.Goodput(bucket).attempts) == 3

    profiler = profiling.Profiler(bucket, ((1, 1),))
    x = jnp.ones(3)
    profiler.before(1, x)
    profiler.after(1, jax.block_until_ready(x + 1))
    assert [name for name in Bucket.store if name.endswith(".xplane.pb")]


def test_a_bucket_that_refuses(bucket, monkeypatch):
    monkeypatch.setattr(Bucket, "_open", lambda *a, **k: (_ for _ in ()).throw(OSError("403")))
    with pytest.raises(CheckpointError, match="may this machine's account write"):
        checkpoint.check_writable(bucket)


def test_growing_files_are_copied_now_and_then(bucket, monkeypatch):
    mirror = storage.Mirror(bucket)
    (mirror.local / "log").write_text("a")
    mirror.push()
    assert not (bucket / "log").exists(), "too soon"
    monkeypatch.setattr(storage, "_PUSH_EVERY", 0.0)
    mirror.push()
    mirror.flush()
    assert (bucket / "log").read_text() == "a"
    (mirror.local / "log").write_text("ab")
    mirror.close()
    assert (bucket / "log").read_text() == "ab"
    assert not mirror.local.exists()


def test_other_places(monkeypatch, tmp_path):
    assert storage.Mirror(tmp_path).local == tmp_path
    with pytest.raises(ConfigError, match="only gs://"):
        storage.path("s3://bucket/run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match="pip install gcsfs"):
        storage.path("gs://bucket/run")
