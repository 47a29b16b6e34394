"""Settings of the CPU platform: when they are made, and that they do what they are for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from iv2_jax import cli
from iv2_jax.parallel import cpu

# Page faults of taking, filling and giving back 64 MB, the third time.
FAULTS = """
import resource, sys
from iv2_jax.parallel import cpu
if not cpu.set_up() and "set" in sys.argv:
    sys.exit("not set")
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(64 << 20)
    block[::4096] = b"x" * (16 << 10)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(*args, **environment):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", cpu.VARIABLE: "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *args], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not os.confstr("CS_GNU_LIBC_VERSION"), reason="mallopt is glibc's")
def test_pages_are_kept_on_cpu_and_only_there():
    assert _faults("set") < 1000
    assert _faults(**{cpu.VARIABLE: "0"}) > 10000
    assert _faults(JAX_PLATFORMS="tpu,cpu") > 10000


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ("--xla_force_host_platform_device_count=8", " --xla_cpu_enable_{}=false"),
        ("--xla_force_host_platform_device_count=8 --xla_cpu_enable_{}=true", ""),
        ("--xla_dump_to=x", ""),
    ],
)
def test_virtual_devices_have_threads_enough(monkeypatch, given, added):
    given, added = (x.format("concurrency_optimized_scheduler") for x in (given, added))
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv(cpu.VARIABLE, "0")
    monkeypatch.delenv("NPROC", raising=False)
    assert not cpu.set_up()
    assert os.environ.pop("NPROC", None) == ("32" if "count" in given else None)
    assert os.environ["XLA_FLAGS"] == given + added


@pytest.mark.parametrize(
    ("platforms", "installed", "want"),
    [
        ("cpu", "libtpu", True),
        ("tpu,cpu", "", False),
        ("", "", True),
        ("", "libtpu", False),
        ("", "jax_cuda12_plugin", False),
    ],
)
def test_where_jax_will_run(monkeypatch, platforms, installed, want):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(
        cpu.importlib.util, "find_spec", lambda name: name if name == installed else None
    )
    assert cpu.chosen() is want


def test_verbs_that_compute_make_the_settings_first(monkeypatch):
    order = []
    monkeypatch.setattr(cpu, "set_up", lambda: order.append("set up"))
    for verb in cli.COMPUTING:
        module = cli.importlib.import_module(cli.VERBS[verb][0])
        monkeypatch.setattr(module, "add_arguments", lambda parser: None)
        monkeypatch.setattr(module, "run", lambda args: order.append("run") or 0)
        assert cli.main([verb]) == 0
    monkeypatch.setattr(
        cli.importlib.import_module(cli.VERBS["zoo"][0]), "run", lambda args: order.append("zoo")
    )
    cli.main(["zoo"])
    assert order == ["set up", "run"] * len(cli.COMPUTING) + ["zoo"]
