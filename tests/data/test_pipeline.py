"""The loader: the same batches for any workers, hosts and start; bad clips; dead workers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from iv2_jax.data import pipeline
from iv2_jax.data.badclips import BadClipMonitor
from iv2_jax.data.pipeline import DataConfig, make_loader
from iv2_jax.data.rows import Order
from iv2_jax.errors import ConfigError, DataError
from tests.data import clips

_CLIPS = 6


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return clips.write_list(tmp_path_factory.mktemp("list"), count=_CLIPS)


@pytest.fixture
def config(manifest):
    return DataConfig(
        source=str(manifest), num_frames=4, size=32, mask="tube", mask_grid=(2, 3, 3), threads=0
    )


@pytest.fixture
def broken(tmp_path):
    """Clips 1 and 4 of 6 do not decode."""
    path = clips.write_list(tmp_path / "broken")
    for i in (1, 4):
        (tmp_path / "broken" / f"clip{i}.mp4").write_bytes(b"")
    return path


def _batches(config, *, steps=4, **options):
    settings = {"seed": 3, "global_batch": 4} | options
    with make_loader(config, num_steps=steps, **settings) as loader:
        return list(loader)


def _assert_same(ours, reference):
    assert len(ours) == len(reference) > 0
    for a, b in zip(ours, reference, strict=True):
        assert set(a) == set(b)
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batch_contents(config):
    (batch,) = _batches(config, steps=1)
    assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
        "video": ((4, 4, 32, 32, 3), "uint8"),
        "index": ((4,), "int32"),
        "replaced": ((4,), "int32"),
        "visible": ((4, 1 + 2 * 2), "int32"),
    }
    assert all(type(array) is np.ndarray for array in batch.values())
    assert (batch["replaced"] == 0).all()
    assert (batch["visible"][:, 0] == 0).all()


def test_index_names_the_clip_that_is_shown(config):
    # Clip i shows 16 * i + frame; the centre of its 64x48 picture has the stripes of bits 1 to 6.
    config = dataclasses.replace(config, augment="center", size=48)
    for batch in _batches(config, steps=3):
        stripes = batch["video"][:, :, 24, [8 * bit - 4 for bit in (4, 5, 6)]].mean(axis=-1) > 128
        shown = stripes @ np.array([1, 2, 4])
        np.testing.assert_array_equal(shown, np.repeat(batch["index"][:, None], 4, axis=1))


@pytest.mark.parametrize("workers", [1, 2])
def test_same_batches_with_worker_processes(config, workers):
    parallel = dataclasses.replace(config, num_workers=workers)
    _assert_same(_batches(parallel), _batches(config))


@pytest.mark.parametrize("threads", [1, 3])
def test_same_batches_with_threads(config, threads):
    threaded = dataclasses.replace(config, threads=threads)
    _assert_same(_batches(threaded), _batches(config))


def test_resuming_is_starting_at_the_step(config):
    whole = _batches(config, steps=7)
    _assert_same(_batches(config, steps=2, start_step=5), whole[5:])


@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_share_the_rows_of_a_batch(config, processes):
    whole = _batches(config)
    parts = [_batches(config, process_index=p, process_count=processes) for p in range(processes)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    _assert_same(joined, whole)


def test_every_epoch_shows_every_clip_in_its_own_order(config):
    rows = np.concatenate([b["index"] for b in _batches(config, steps=9)])
    epochs = rows.reshape(-1, _CLIPS)
    assert (np.sort(epochs, axis=1) == np.arange(_CLIPS)).all()
    assert len({tuple(e) for e in epochs}) > 3
    other = np.concatenate([b["index"] for b in _batches(config, steps=9, seed=4)])
    assert (rows != other).any()


def test_order_of_many_clips_and_one():
    order = Order(1000, 0, shuffle=True)
    first = [order.clip(i) for i in range(1000)]
    assert sorted(first) == list(range(1000))
    second = [order.clip(1000 + i) for i in range(1000)]
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    assert [Order(1, 5, shuffle=True).clip(i) for i in range(3)] == [0, 0, 0]
    assert [Order(3, 5, shuffle=False).clip(i) for i in range(5)] == [0, 1, 2, 0, 1]


def test_same_clip_is_augmented_anew(config):
    batches = _batches(dataclasses.replace(config, shuffle=False), steps=6)
    shown = {}
    for batch in batches:
        for video, index in zip(batch["video"], batch["index"], strict=True):
            shown.setdefault(int(index), []).append(video)
    assert all(len({v.tobytes() for v in views}) > 1 for views in shown.values())


def test_views(config):
    (batch,) = _batches(dataclasses.replace(config, views=3), steps=1)
    assert batch["video"].shape == (4, 3, 4, 32, 32, 3)
    assert (batch["video"][:, 0] != batch["video"][:, 1]).any()


# -- evaluation -----------------------------------------------------------------------------------


def _eval(config, **changes):
    return dataclasses.replace(config, eval=True, augment="center", mask="none", **changes)


def test_evaluation_is_one_padded_pass_in_order(config):
    for processes in (1, 2, 4):
        parts = [
            _batches(_eval(config), steps=None, process_index=p, process_count=processes)
            for p in range(processes)
        ]
        assert {len(part) for part in parts} == {2}  # hosts agree about the number of steps
        index = np.concatenate([part[k]["index"] for k in range(2) for part in parts])
        valid = np.concatenate([part[k]["valid"] for k in range(2) for part in parts])
        assert index.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
        assert valid.tolist() == [True] * 6 + [False] * 2


def test_evaluation_is_deterministic_and_resumes(config):
    whole = _batches(_eval(config), steps=None)
    _assert_same(_batches(_eval(config), steps=None, seed=9), whole)
    _assert_same(_batches(_eval(config), steps=None, start_step=1), whole[1:])
    assert _batches(_eval(config), steps=None, start_step=2) == []


def test_evaluation_views_and_crops(config):
    batch = _batches(_eval(config, views=2, crops=3), steps=None)[0]
    assert batch["video"].shape == (4, 6, 4, 32, 32, 3)


def test_evaluation_marks_bad_clips(config, broken):
    config = _eval(config, source=str(broken), max_bad_share=1.0)
    batches = _batches(config, steps=None)
    index, valid, replaced = (
        np.concatenate([b[name] for b in batches]) for name in ("index", "valid", "replaced")
    )
    assert index.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert valid.tolist() == [True, False, True, True, False, True, False, False]
    assert replaced.tolist() == [0, 1, 0, 0, 1, 0, 0, 0]


# -- bad clips ------------------------------------------------------------------------------------


def test_bad_clips_are_replaced_named_once_and_counted(config, broken, tmp_path, capfd):
    log = tmp_path / "runs" / "bad_clips.jsonl"
    config = dataclasses.replace(
        config, source=str(broken), max_bad_share=1.0, bad_clip_log=str(log)
    )
    batches = _batches(config, steps=6)
    index = np.concatenate([b["index"] for b in batches])
    replaced = np.concatenate([b["replaced"] for b in batches])
    order = Order(_CLIPS, 3, shuffle=True)
    for row, (i, r) in enumerate(zip(index, replaced, strict=True)):
        assert i == order.clip(row, r)
        assert {order.clip(row, k) for k in range(r)} <= {1, 4}
    assert set(index) == {0, 2, 3, 5}
    assert sum(replaced > 0) == 8  # 2 of 6 clips, 4 epochs
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["path"][-9:] for line in lines) == ["clip1.mp4", "clip4.mp4"]
    assert all("zero bytes" in line["reason"] for line in lines)
    err = capfd.readouterr().err
    assert err.count("bad clip, replaced") == 2
    parallel = dataclasses.replace(config, num_workers=2)
    _assert_same(_batches(parallel, steps=6), batches)
    assert len(log.read_text().splitlines()) == 2  # workers saw that they were named already


def test_hosts_do_not_share_a_log(config, broken, tmp_path):
    log = tmp_path / "bad.jsonl"
    config = dataclasses.replace(
        config, source=str(broken), max_bad_share=1.0, bad_clip_log=str(log)
    )
    _batches(config, process_index=1, process_count=2)
    assert (tmp_path / "bad.1.jsonl").exists()
    assert not log.exists()


def test_too_many_bad_clips_end_the_run(config, broken):
    config = dataclasses.replace(config, source=str(broken), max_bad_share=0.2)
    with pytest.raises(DataError) as caught:
        _batches(config, steps=60)
    assert "max_bad_share=0.2" in str(caught.value)
    assert "clip1.mp4" in str(caught.value)
    assert "clip4.mp4" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_clip_decodes(config, tmp_path, workers):
    path = clips.write_manifest(tmp_path / "m.jsonl", [{"path": f"{i}.mp4"} for i in range(30)])
    config = dataclasses.replace(config, source=str(path), num_workers=workers, max_tries=5)
    with pytest.raises(DataError, match=r"5 clips in a row do not decode.*\d+\.mp4"):
        _batches(config)


def test_monitor_looks_at_the_last_thousand_rows():
    monitor = BadClipMonitor(0.1, lambda row, count: [f"bad{row}.mp4"] * count)
    good = np.zeros(100, np.int32)
    for i in range(50):
        monitor.update(good, range(100 * i, 100 * i + 100))
    bad = np.ones(50, np.int32)
    monitor.update(bad, range(5000, 5050))
    monitor.update(bad, range(5050, 5100))  # 100 of the last 1000: still allowed
    with pytest.raises(DataError, match=r"101 of the last 1000 rows.*\n  bad5\d+\.mp4\n"):
        monitor.update(bad[:1], [5100])
    assert (monitor.rows, monitor.bad_rows) == (5101, 101)


def test_monitor_allows_one_bad_clip_at_the_start_unless_none_are_allowed():
    BadClipMonitor(0.02).update(np.array([1, 0]), [0, 1])
    with pytest.raises(DataError):
        BadClipMonitor(0.0).update(np.array([1, 0]), [0, 1])


def test_oddities_are_named_but_used(config, tmp_path, capfd):
    options = {"options": {"bf": "0"}, "file_options": {"movflags": "faststart"}}
    whole = clips.write_clip(tmp_path / "w.mp4", 60, **options).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 7 // 10])
    path = clips.write_manifest(tmp_path / "m.jsonl", [{"path": "cut.mp4"}])
    batches = _batches(dataclasses.replace(config, source=str(path)))
    assert all((b["replaced"] == 0).all() for b in batches)
    err = capfd.readouterr().err
    assert err.count("odd clip") == 1
    assert "cut off" in err


# -- workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_worker_ends_the_run_soon(config, workers):
    config = dataclasses.replace(config, num_workers=workers)
    before = set(multiprocessing.active_children())
    with make_loader(config, seed=0, global_batch=2) as loader:
        next(loader)
        started = set(multiprocessing.active_children()) - before
        assert len(started) == workers
        os.kill(started.pop().pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(DataError, match=r"worker died.*-9"):
            list(itertools.islice(loader, 1000))
        assert time.monotonic() - begin < 20
        with pytest.raises(StopIteration):
            next(loader)


def test_closing_ends_the_workers(config):
    config = dataclasses.replace(config, num_workers=1)
    before = set(multiprocessing.active_children())
    loader = make_loader(config, seed=0, global_batch=2)
    next(loader)
    loader.close()
    loader.close()
    assert set(multiprocessing.active_children()) <= before


def test_too_little_shared_memory_is_said_at_once(config, monkeypatch):
    usage = pipeline.shutil.disk_usage("/")
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(pipeline.sys, "platform", "linux")
    monkeypatch.setattr(pipeline.os.path, "isdir", lambda _: True)
    with pytest.raises(DataError, match="shm-size"):
        pipeline._check_shared_memory(dataclasses.replace(config, num_workers=4), 1000)


# -- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_frames": 0}, "data.num_frames must be at least 1"),
        ({"num_workers": -1}, "data.num_workers must not be negative"),
        ({"augment": "centre"}, "did you mean 'center'"),
        ({"mask": "tubes"}, "did you mean 'tube'"),
        ({"mask": "tube", "mask_grid": None}, "needs data.mask_grid"),
        ({"sampling": "dens"}, "did you mean 'dense'"),
        ({"max_bad_share": 1.5}, "data.max_bad_share must be from 0 to 1"),
        ({"eval": True}, "needs data.augment='center'"),
        ({"crops": 3}, "data.crops > 1 needs"),
        ({"short_side": 16}, "must be at least data.size"),
    ],
)
def test_bad_configs(config, changes, words):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config, **changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch": 3, "process_count": 2}, "multiple of the 2 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index 2"),
        ({"seed": -1}, "seed"),
        ({"start_step": -1}, "start_step"),
    ],
)
def test_bad_numbers(config, options, words):
    with pytest.raises(ConfigError, match=words):
        _batches(config, **options)


def test_importing_the_package_is_cheap():
    code = (
        "import sys, iv2_jax.data.pipeline, iv2_jax.data.commands, iv2_jax.data.builders.packed;"
        "bad = {'jax', 'flax', 'torch', 'tensorflow', 'grain', 'tensorflow_datasets'};"
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
