"""Stored teacher features: the same run as with the teachers in it, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from iv2_jax.data.pipeline import make_loader
from iv2_jax.data.targets import INDEX, Targets
from iv2_jax.errors import ConfigError, DataError
from iv2_jax.models.teachers import stored
from iv2_jax.parallel.mesh import make_mesh
from iv2_jax.train import loop
from iv2_jax.train.program import build_program, put_frozen
from iv2_jax.train.teacher_features import write_teacher_features
from tests.data import clips
from tests.train import tiny

CLIPS = 5


@pytest.fixture(autouse=True)
def tiny_teacher(monkeypatch):
    tiny.register(monkeypatch)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return clips.write_list(tmp_path_factory.mktemp("list"), count=CLIPS)


def config(source, **changes):
    data = {
        "source": str(source),
        "num_frames": 2 * tiny.FRAMES,
        "size": tiny.SIZE,
        "augment": "center",
        "fixed_view": True,
        "threads": 0,
    }
    both = {"data": data, "eval_data": data | {"eval": True, "fixed_view": False}}
    return tiny.config(**both, batch_size=4, **changes)


def losses(config, steps=3):
    stage = config.make_stage()
    program = build_program(config, stage, make_mesh(config.mesh))
    state = program.init(jax.random.key(0))
    frozen = put_frozen(stage, program.mesh)
    found = []
    batches = stage.train_batches(0)
    for _ in range(steps):
        batch = loop.to_device(next(batches), stage.host_arrays, program.mesh)
        assert set(batch) == set(stage.abstract_batches(4)[""])
        state, metrics = program.train_step(state, frozen, batch, jax.random.key(1))
        found.append(jax.device_get(metrics))
    batches.close()
    return found


def test_a_run_gives_the_losses_of_one_with_its_teachers(manifest, tmp_path):
    """Uniform masks: a mask drawn by rounded saliency may differ in a patch."""
    live = config(manifest, mask={"kind": "uniform", "ratio": 0.5})
    written = write_teacher_features(live, tmp_path / "t")
    assert written == {"train": CLIPS, "eval": CLIPS}
    stored = dataclasses.replace(live, teacher_features=str(tmp_path / "t"))
    assert stored.make_stage().load_frozen() == {}
    for a, b in zip(losses(live), losses(stored), strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=3e-3, err_msg=name)


def test_masks_follow_the_stored_saliency(manifest, tmp_path):
    live = config(manifest)
    write_teacher_features(live, tmp_path / "t")
    stage = dataclasses.replace(live, teacher_features=str(tmp_path / "t")).make_stage()
    batch = next(stage.eval_batches())
    outputs = live.make_stage().teach(live.make_stage().load_frozen(), batch["video"])
    expected = stage.saliency(outputs, 4)
    expected = expected / np.asarray(expected).mean((1, 2), keepdims=True)
    found = stage.saliency(stored.unpack(batch, stage.teachers), 4)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_reads_each_clip_its_own(manifest, tmp_path, workers):
    run = config(manifest)
    write_teacher_features(run, tmp_path / "t")
    data = dataclasses.replace(run.data, targets=str(tmp_path / "t"), num_workers=workers)
    targets = Targets(tmp_path / "t", "train")
    with make_loader(data, seed=0, global_batch=4, num_steps=3) as loader:
        for batch in loader:
            ids = [loader.source.clips[i].id for i in batch["index"]]
            for i, record in enumerate(targets.records(ids)):
                for name, array in targets.read(record).items():
                    np.testing.assert_array_equal(batch[name][i], array)


def test_what_did_not_decode_is_replaced(tmp_path):
    manifest = clips.write_list(tmp_path / "list", count=CLIPS)
    whole = (tmp_path / "list" / "clip2.mp4").read_bytes()
    (tmp_path / "list" / "clip2.mp4").write_bytes(b"")
    run = config(manifest)
    lenient = dataclasses.replace(run.data, max_bad_share=0.5)
    run = dataclasses.replace(
        run, data=lenient, eval_data=dataclasses.replace(lenient, eval=True, fixed_view=False)
    )
    assert write_teacher_features(run, tmp_path / "t")["train"] == CLIPS - 1
    (tmp_path / "list" / "clip2.mp4").write_bytes(whole)  # mended since
    data = dataclasses.replace(lenient, targets=str(tmp_path / "t"))
    with make_loader(data, seed=0, global_batch=5, num_steps=1) as loader:
        batch = next(loader)
    assert 2 not in batch["index"]
    assert batch["replaced"].sum() == 1


def test_other_settings_and_lists_are_refused(manifest, tmp_path):
    run = config(manifest)
    write_teacher_features(run, tmp_path / "t")
    folder = str(tmp_path / "t")
    other = dataclasses.replace(run, teacher_features=folder, mae_teacher=None)
    student = dataclasses.replace(run.student, mae=None)
    with pytest.raises(ConfigError, match="mae_teacher"):
        next(dataclasses.replace(other, student=student).make_stage().train_batches(0))
    data = dataclasses.replace(run.data, augment="multiscale_crop", fixed_view=False)
    with pytest.raises(ConfigError, match="augment='center'"):
        dataclasses.replace(run, teacher_features=folder, data=data)
    data = dataclasses.replace(run.eval_data, sampling="dense")
    with pytest.raises(ConfigError, match=r"eval_data\.sampling"):
        dataclasses.replace(run, teacher_features=folder, eval_data=data)
    longer = clips.write_list(tmp_path / "list", count=CLIPS + 1)
    data = dataclasses.replace(run.data, source=str(longer))
    more = dataclasses.replace(run, teacher_features=folder, data=data)
    with pytest.raises(DataError, match="nothing for 1 of 6 clips"):
        next(more.make_stage().train_batches(0))
    with pytest.raises(DataError, match="already exists"):
        write_teacher_features(run, folder)
    with pytest.raises(ConfigError, match="fixed_view"):
        dataclasses.replace(run.data, fixed_view=False, targets=folder)


def test_damaged_folders_are_refused(manifest, tmp_path):
    write_teacher_features(config(manifest), tmp_path / "t")
    with pytest.raises(DataError, match=f"has no {INDEX}"):
        Targets(tmp_path, "train")
    with pytest.raises(DataError, match="no part 'other'"):
        Targets(tmp_path / "t", "other")
    index = json.loads((tmp_path / "t" / INDEX).read_text())
    index["arrays"][0][1][0] += 1
    (tmp_path / "t" / INDEX).write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"record 0 has \d+ bytes"):
        Targets(tmp_path / "t", "train").read(0)
    (tmp_path / "t" / INDEX).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        Targets(tmp_path / "t", "train")


def test_nothing_is_left_behind_when_writing_fails(tmp_path):
    manifest = clips.write_list(tmp_path / "list", count=2)
    for i in range(2):
        (tmp_path / "list" / f"clip{i}.mp4").write_bytes(b"")
    with pytest.raises(DataError):
        write_teacher_features(config(manifest), tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["list"]
