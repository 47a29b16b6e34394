"""Starts the processes of a run on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
WAIT = 420  # seconds; bounds a test whose run hangs


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Run:
    """The processes of one run, started; their output goes to WORKDIR.I.START.log.

    Args:
      config: Plain values, written beside the workdir.
      workdir: The run's folder.
      processes: How many; 1 starts without a coordinator.
      devices: Virtual devices of each.
      environment: More variables.
      only: Start only these of them.
      port: Of the coordinator; default one that is free.
      verb: Another command than `train` with its arguments; the processes find each other by
        variables of the environment.
    """

    def __init__(
        self,
        config: dict[str, Any],
        workdir: Path,
        processes: int,
        *,
        devices: int = 1,
        environment: dict[str, str] | None = None,
        only: tuple[int, ...] | None = None,
        port: int = 0,
        verb: tuple[str, ...] = (),
    ) -> None:
        self.workdir = workdir
        self.mesh = f"{processes * devices} devices as {config.get('mesh')}"
        file = workdir.with_name(f"{workdir.name}.config.json")
        file.write_text(json.dumps(config))
        xla = os.environ.get("XLA_FLAGS", "").split()
        xla = [flag for flag in xla if "device_count" not in flag]
        xla.append(f"--xla_force_host_platform_device_count={devices}")
        variables = {
            **os.environ,
            "XLA_FLAGS": " ".join(xla),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(REPO),
            "IV2_COMPILE_CACHE": "",
            "IV2_HEARTBEAT_SECONDS": "10",
            "IV2_JOIN_SECONDS": "120",
        }
        command = [sys.executable, "-m", "tests.multihost.worker"]
        command += verb or ("train", "--config", str(file), "--workdir", str(workdir))
        port = port or free_port()
        self.logs, self.processes = [], []
        for number in only if only is not None else range(processes):
            joining = {
                "coordinator": ("JAX_COORDINATOR_ADDRESS", f"localhost:{port}"),
                "processes": ("JAX_NUM_PROCESSES", str(processes)),
                "process": ("JAX_PROCESS_ID", str(number)),
            }
            flags = [word for k, (_, v) in joining.items() for word in (f"--{k}", v)]
            if verb:
                variables |= dict(joining.values())
            start = len(list(workdir.parent.glob(f"{workdir.name}.{number}.*.log")))
            self.logs.append(workdir.with_name(f"{workdir.name}.{number}.{start}.log"))
            with self.logs[-1].open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        command + (flags if processes > 1 and not verb else []),
                        env=variables | (environment or {}),
                        cwd=REPO,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, seconds: float = WAIT) -> list[int]:
        """Exit codes; a process that goes on for longer is killed, and the test fails."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {seconds} s:\n{self.log()}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """Ends what is left."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def log(self) -> str:
        """What the processes said, the end of it."""
        return "\n".join(f"-- {log.name}\n{log.read_text()[-4000:]}" for log in self.logs)

    def said(self) -> str:
        """All that the first process said."""
        return self.logs[0].read_text()

    def last_step(self) -> int:
        """The last step that it told."""
        return max(map(int, re.findall(r"^step (\d+) train", self.said(), re.MULTILINE)), default=0)

    def wait_for(
        self, text: str, seconds: float = WAIT, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        """Waits until the first process says something; fails when the run ends before."""
        deadline = time.monotonic() + seconds
        while text not in self.said():
            assert all(p.poll() is None for p in self.processes), self.log()
            assert time.monotonic() < deadline, self.log()
            meanwhile()
            time.sleep(0.02)

    def wait_for_step(self, step: int, seconds: float = WAIT) -> None:
        """Waits until a step is done."""
        self.wait_for(f"step {step} train", seconds)


def toy(**changes: Any) -> dict[str, Any]:
    """A toy run over all devices, split both ways."""
    return {
        "stage": "toy",
        "steps": 12,
        "batch_size": 8,
        "optimizer": {"lr": 0.05, "warmup_steps": 2, "scale_lr_by_batch": False},
        "checkpoint": {"every": 4},
        "mesh": {"data": 1, "fsdp": -1},
        "tensorboard": False,
    } | changes
