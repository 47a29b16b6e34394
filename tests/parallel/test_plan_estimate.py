"""Topologies, times, the search's frontier and the reports; no TPU compiler."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from iv2_jax import cli
from iv2_jax.errors import ConfigError
from iv2_jax.parallel import described
from iv2_jax.parallel.mesh import AXES
from iv2_jax.parallel.plan import compile as compile_lib
from iv2_jax.parallel.plan import estimate as estimate_lib
from iv2_jax.parallel.plan import hardware, page, report, search
from iv2_jax.parallel.plan.count import Collective, Counted, Operation, Traffic
from iv2_jax.parallel.plan.planning import Plan
from tests.train import tiny, toy


@pytest.mark.parametrize(
    ("text", "chips", "wrap"),
    [
        ("v5p:8x8x8", 512, (True, True, True)),
        ("v5p:2x2x2", 8, (False, False, False)),
        ("v4:4x4x8", 128, (True, True, True)),
        ("v5e:16x16", 256, (True, True, False)),
        ("v6e:8x16", 128, (False, True, False)),
        ("trillium:4x4", 16, (False, False, False)),
        ("tpu7x:4x4x4", 64, (True, True, True)),
    ],
)
def test_which_axes_of_a_slice_close(text, chips, wrap):
    topology = described.topology(text)
    assert (topology.chips, topology.wrap) == (chips, wrap)
    assert described.topology(text, slices=3).chips == 3 * chips


@pytest.mark.parametrize(
    ("text", "slices", "problem"),
    [
        ("v5p", 1, "is not CHIP:SHAPE"),
        ("v5p:8x", 1, "is not CHIP:SHAPE"),
        ("v5q:8x8", 1, "unknown chip; did you mean 'v5p'"),
        ("v5e:4x4x4", 1, "v5e has 2 axes, such as v5e:4x4"),
        ("v6e:32x16", 1, "the largest slice of v6e is 16x16"),
        ("v5e:4x4", 0, "--slices must be >= 1"),
    ],
)
def test_slices_that_do_not_exist(text, slices, problem):
    with pytest.raises(ConfigError, match=problem):
        described.topology(text, slices)


def test_no_compiler_and_a_busy_one_are_said(monkeypatch):
    from jax.experimental import topologies

    def describe(message):
        def refuse(**_):
            raise RuntimeError(message)

        monkeypatch.setattr(topologies, "get_topology_desc", refuse)

    topology = described.topology("v5e:2x2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the TPU compiler"):
        topology.devices()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    describe("The TPU is already in use by process 7; /tmp/libtpu_lockfile")
    with pytest.raises(ConfigError, match="another process holds the TPU compiler"):
        topology.devices()
    describe("bad shape")
    with pytest.raises(ConfigError, match="libtpu does not describe topology v5e:2x2: bad shape"):
        topology.devices()


def test_every_chip_of_the_table_can_be_described_and_has_a_price():
    chips = hardware.chip_table()["chips"]
    for chip in chips:
        edges = len(described._FAMILIES[chip][2])
        assert described.topology(f"{chip}:{'x'.join(['4'] * edges)}").chip == chip
        assert hardware.prices().of(chip) > 0
        assert 0.9e9 < hardware.device(chip).clock < 2.6e9
    assert set(chips) == set(described._FAMILIES)


def test_prices_of_a_file(tmp_path):
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"currency": "EUR", "chip_hour": {"v5e": 0.5}}))
    prices = hardware.prices(str(file))
    assert (prices.of("v5e"), prices.currency) == (0.5, "EUR")
    with pytest.raises(ConfigError, match=r"no chip_hour\.v5p"):
        prices.of("v5p")
    file.write_text("{}")
    with pytest.raises(ConfigError, match='needs "chip_hour"'):
        hardware.prices(str(file))
    with pytest.raises(ConfigError, match="no file"):
        hardware.prices(str(tmp_path / "none.json"))


@dataclasses.dataclass(frozen=True)
class _Chip:
    """A described device as far as estimates look at it."""

    index: int
    coords: tuple[int, ...]
    slice_index: int


TOPOLOGY = described.topology("v5e:16x16", slices=2)


def _mesh():
    """data 4 x fsdp 128: fsdp fills half a slice of 16 x 16, data crosses two slices."""
    chips = [_Chip(i, (i % 256 // 16, i % 16, 0), i // 256) for i in range(512)]
    grid = np.empty(512, object)
    grid[:] = chips
    mesh = object.__new__(_FakeMesh)
    mesh.devices, mesh.axis_names = grid.reshape(4, 128, 1), AXES
    mesh.shape = dict(zip(AXES, (4, 128, 1), strict=True))
    mesh.size = 512
    return mesh


class _FakeMesh:
    pass


def _step(counted, **changes):
    values = {
        "kind": "",
        "clips": 512,
        "held": {"parameters": 2**30, "optimizer state": 2**31, "moving average": 0},
        "temporaries": 2**32,
        "other": 2**20,
        "failure": "",
        "model_flops": 512 * 1e12,
        "asked_flops": 512 * 1.2e12,
        "kernel_flops": 512 * 0.2e12,
        "counted": counted,
        "compile_seconds": 1.0,
    }
    return compile_lib.Step(**values | changes)


def _counted():
    slice_group = tuple(range(128))
    across = tuple(range(0, 512, 128))
    return Counted(
        operations=[
            Operation(10, 1e11, 1e8, int(1.503e9 * 1e-3), False),  # 1 ms at v5e's clock
            Operation(10, 0, 8.19e8, 0, False),  # 1 ms of memory
            Operation(10, 0, 8.19e8, 0, True),  # beside the others
        ],
        collectives={
            Collective("all-gather", slice_group): Traffic(10, 1.28e8, 1.27e8),
            Collective("all-reduce", across): Traffic(1, 1e7, 1.5e7),
            Collective("all-reduce", (1, 2), between_slices=True): Traffic(1, 1e6, 1e6),
        },
    )


def test_times_of_a_step():
    found = estimate_lib.estimate(_step(_counted()), _mesh(), TOPOLOGY)
    kernel = 0.2e12 / (0.5 * 197e12)
    assert found.hbm_seconds == pytest.approx(10 * (1e8 + 2 * 8.19e8) / 8.19e11)
    assert found.bound_seconds == pytest.approx(
        max(10 * (1e-3 + 1e-3) + kernel, found.hbm_seconds), rel=1e-2
    )
    assert found.hardware_flops == pytest.approx(512 * 1.2e12)
    gather, handed, reduce = sorted(found.links, key=lambda link: (link.kind, link.network))
    assert (handed.axes, handed.network) == (("data",), "dcn")
    assert handed.dcn_seconds == pytest.approx(1e6 / 3.125e9)
    # Half of one edge (open) and a whole edge (a ring): 1 + 2 links.
    assert (gather.axes, gather.network) == (("fsdp",), "ici")
    assert gather.ici_seconds == pytest.approx(1.27e8 / (3 * 45e9))
    # 4 replicas on 2 slices: sent x (2 - 1) / (4 - 1) crosses between them.
    assert (reduce.axes, reduce.network) == (("data",), "ici+dcn")
    assert reduce.dcn_seconds == pytest.approx(1.5e7 / 3 / 3.125e9)
    assert not found.notes


def test_flops_that_are_repeated_or_lost_are_noted():
    step = _step(_counted(), asked_flops=512 * 0.9e12)
    (note,) = estimate_lib.estimate(step, _mesh(), TOPOLOGY).notes
    assert "+33.3 %" in note
    assert "repeated" in note


def test_remat_is_set_everywhere_and_the_mesh_fills_the_slice(monkeypatch):
    tiny.register(monkeypatch)
    config = tiny.config()
    changed = compile_lib.with_remat(config, "full")
    assert changed.student.encoder.remat == "full"
    assert compile_lib.with_remat(changed, "full") is changed
    mesh = dataclasses.replace(config.mesh, data=2, fsdp=4)
    config = dataclasses.replace(config, mesh=mesh)
    fitted, note = compile_lib.fit_mesh(config, 64)
    assert fitted.mesh.data == 16
    assert "mesh.data 2 -> 16" in note
    with pytest.raises(ConfigError, match="does not divide 6 devices"):
        compile_lib.fit_mesh(config, 6)


def _plan(clips=512, temporaries=2**32, failure=""):
    step = _step(
        None if failure else _counted(), clips=clips, temporaries=temporaries, failure=failure
    )
    mesh = _mesh()
    found = estimate_lib.estimate(step, mesh, TOPOLOGY)
    price = None
    if found is not None:
        rate = {"": found.bound_seconds}
        price = estimate_lib.cost(rate, {"": clips}, 1e6, TOPOLOGY, hardware.prices())
    return Plan(
        name="a <config>",
        config=toy.config(),
        topology=TOPOLOGY,
        mesh=mesh,
        device=hardware.device("v5e"),
        steps=[step],
        estimates={"": found},
        cost=price,
        sharding=[],
        frozen_sharding=[],
        notes=[],
    )


def test_price_of_samples():
    plan = _plan()
    seconds = plan.estimates[""].bound_seconds
    assert plan.cost.steps == 1954
    assert plan.cost.chip_hours == pytest.approx(1954 * seconds / 3600 * 512)
    assert plan.cost.price == pytest.approx(plan.cost.chip_hours * hardware.prices().of("v5e"))


def test_what_does_not_fit():
    assert _plan().fits
    assert not _plan(temporaries=12 * 2**30).fits  # 15 of 16 GiB: above the line
    failed = _plan(temporaries=33 * 2**30, failure="Ran out of memory")
    assert not failed.fits
    assert failed.hbm_share > 2
    assert "not compiled: Ran out of memory" in report.text(failed)


def test_reports_hold_the_figures():
    plan = _plan()
    text = report.text(plan)
    assert "fits: 43.8 % of HBM" in text
    assert "ahead of time, not run on hardware" in text
    assert "MFU" not in text
    shown = page.html([plan, _plan(failure="none", temporaries=None)])
    assert shown.count("<svg") == 4
    assert "a &lt;config&gt;" in shown
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["steps"]["step"]["compiled_bound"] == pytest.approx(
        1e12 / (197e12 * plan.estimates[""].bound_seconds)
    )


def test_a_page_of_a_recipe():
    plan = _plan()
    values = json.loads(json.dumps(plan.to_dict()))
    page_of_it = report.markdown(values, report.text(plan), "iv2 plan --config c.py")
    assert "| HBM of a device | 43.8 % of 16" in page_of_it
    assert report.text(plan) in page_of_it
    assert "iv2 plan --config c.py" in page_of_it


def test_the_heaviest_operations_add_up():
    """Two lines of the step, one of them in two places."""
    device = hardware.device("v5e")
    run = {"flops": 0.0, "bytes": device.hbm_bandwidth, "cycles": 0, "overlapped": False}
    operations = [
        Operation(times=2, source="dot of mlp, forward", **run),
        Operation(times=3, source="add of the step, forward", **run),
        Operation(times=4, source="dot of mlp, forward", **run),
    ]
    found = estimate_lib._heaviest(Counted(operations), device)
    assert [(h.source, h.seconds, h.times) for h in found] == [
        ("dot of mlp, forward", pytest.approx(6.0), 6),
        ("add of the step, forward", pytest.approx(3.0), 3),
    ]


def test_the_frontier_holds_what_nothing_beats():
    def trial(policy, clips, temporaries):
        return search.Trial(clips, 16, policy, _plan(clips, temporaries))

    trials = [
        trial("full", 512, 2**30),
        trial("dots", 1024, 2**32),
        trial("none", 1024, 2**33),  # as fast as dots, and takes more
        trial("none", 2048, 14 * 2**30),  # does not fit
    ]
    marked = search.mark_frontier(trials)
    assert [(t.batch, t.remat) for t in marked if t.on_frontier] == [(1024, "dots"), (512, "full")]
    assert search.text(marked).count("frontier") == 2


def test_a_search_skips_what_cannot_fit(monkeypatch):
    tried = []

    def make_plan(config, topology, **_):
        tried.append((config.batch_size, config.mesh.fsdp))
        if config.mesh.fsdp == 2:
            raise ConfigError("a parameter is whole")
        failed = config.batch_size > 4
        return _plan(512, 33 * 2**30, "Ran out") if failed else _plan(512)

    monkeypatch.setattr(search, "make_plan", make_plan)
    found = search.search(
        toy.config(), TOPOLOGY, batches=[4, 8], fsdp=[1, 2, 3], remat=["none", "dots", "full"]
    )
    assert tried == [(4, 1)] * 3 + [(4, 2)] * 3 + [(8, 1)] + [(8, 2)] * 3
    problems = {t.problem for t in found}
    assert "mesh.fsdp 3 does not divide 512 devices" in problems
    assert "a parameter is whole" in problems
    assert "a policy that keeps less does not fit" in problems
    with pytest.raises(ConfigError, match=r"--remat: \['some'\] unknown"):
        search.search(toy.config(), TOPOLOGY, remat=["some"])


def test_the_command_line_names_mistakes(capsys):
    config = "configs/demo/stage1.py"
    assert cli.main(["plan", "--config", config, "--topology", "v5e"]) == 2
    assert "is not CHIP:SHAPE" in capsys.readouterr().err
    assert cli.main(["plan", "--config", config, "--topology", "v5e:2x2", "--samples", "-1"]) == 2
    assert "--samples must be positive" in capsys.readouterr().err


def test_groups_by_the_axes_they_cross():
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4, 1), AXES)
    assert estimate_lib.group_axes((0, 1, 2, 3), mesh) == ("fsdp",)
    assert estimate_lib.group_axes((0, 4), mesh) == ("data",)
    assert estimate_lib.group_axes(tuple(range(8)), mesh) == ("data", "fsdp")
    assert estimate_lib.group_axes((3,), mesh) == ()


def test_arguments():
    from iv2_jax.parallel.plan import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(
        ["--config", "c", "--topology", "t", "--batches", "1,2", "--remat", "dots,full"]
    )
    assert (args.batches, args.remat, args.slices) == ([1, 2], ["dots", "full"], 1)
