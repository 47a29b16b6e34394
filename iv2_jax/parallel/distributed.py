"""Process start-up, and what the processes of a run tell each other.

A run is one process or several (one a host). Several join through JAX's coordination service,
which process 0 serves; it also notices a process that has died. See docs/faults.md.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import glob
import hashlib
import importlib.util
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv2_jax.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "IV2_COMPILE_CACHE"
JOIN_VARIABLE, HEARTBEAT_VARIABLE = "IV2_JOIN_SECONDS", "IV2_HEARTBEAT_SECONDS"
EXIT_RESTART = 75  # EX_TEMPFAIL: "start me again"
_PORT_SECONDS = 20.0  # a process 0 that was just stopped may still hold the port for so long


class PeerMissing(UserError):
    """The processes of a run did not come together in time; starting again may help."""


@dataclass(frozen=True)
class Joining:
    """How this process finds the others.

    Attributes:
      coordinator: HOST:PORT of process 0.
      processes: How many there are.
      process: Which of them this is, from 0.
    """

    coordinator: str
    processes: int
    process: int

    def __post_init__(self) -> None:
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
            raise ConfigError(
                f"coordinator {self.coordinator!r}: expected HOST:PORT of process 0, such as "
                "10.0.0.2:8476"
            )
        if not 0 <= self.process < self.processes:
            raise ConfigError(
                f"process {self.process} of {self.processes}: processes are numbered from 0 to "
                f"{self.processes - 1}"
            )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of process 0."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def joining(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Joining | None:
    """What the command line says, else `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`; None when neither says anything.

    Raises:
      ConfigError: Some of the three are missing or are no numbers.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [
        str(value) if value is not None else os.environ.get(name, "")
        for value, name in zip((coordinator, processes, process), names, strict=True)
    ]
    if not any(given):
        return None
    flags = ("--coordinator", "--processes", "--process")
    missing = [f"{f} (or {n})" for f, n, v in zip(flags, names, given, strict=True) if not v]
    if missing:
        raise ConfigError(f"several processes need all of {', '.join(flags)}; no {missing[0]}")
    try:
        return Joining(given[0], int(given[1]), int(given[2]))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--processes {given[1]!r} and --process {given[2]!r} must be whole numbers"
        ) from None


def start(join: Joining | None = None) -> None:
    """Joins the other processes of the run, if any, and turns the compilation cache on.

    Without `join`: as `joining` finds in the environment, else on a TPU VM JAX asks the slice
    (`IV2_MULTIHOST=0` keeps it from that, `=1` makes it ask elsewhere too). Must be called before
    any other use of JAX.

    Raises:
      ConfigError: A setting is wrong, or process 0's port is taken.
      PeerMissing: The others did not come within `IV2_JOIN_SECONDS` (300).
    """
    join = join or joining()
    asked = os.environ.get("IV2_MULTIHOST", "")
    if join is not None and join.processes > 1:
        _join(join)
    elif join is None and (asked == "1" or (asked != "0" and _on_tpu_vm())):
        _join(None)
    cache = os.environ.get(CACHE_VARIABLE, str(Path.home() / ".cache" / "iv2_jax" / "xla"))
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    # Random bits do not depend on how an array is laid out over devices.
    jax.config.update("jax_threefry_partitionable", True)


def _on_tpu_vm() -> bool:
    """Whether JAX will run on this machine's TPUs."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(
        chips and importlib.util.find_spec("libtpu") and (not platforms or "tpu" in platforms)
    )


def _join(join: Joining | None) -> None:
    """Connects to JAX's coordination service; None asks the cluster for the three settings."""
    seconds = _seconds(JOIN_VARIABLE, 300)
    heartbeat = _seconds(HEARTBEAT_VARIABLE, 100)
    who = f"process {join.process} of {join.processes}" if join else "this process"
    # It would take SIGTERM from us; `Hosts` tells the others of a stop.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if join is not None and join.process == 0:
        _wait_for_port(join.address[1])
    elif join is not None:
        _wait_for_coordinator(join, seconds)
    text = (
        f"{who} did not find all the others within {seconds} s. Is each of them started, with the "
        f"same coordinator{' ' + join.coordinator if join else ''} and number of processes, and "
        f"an id of its own? {JOIN_VARIABLE} sets the time."
    )
    _exit_instead_of_abort(text)
    arguments = (join.coordinator, join.processes, join.process) if join else ()
    try:
        jax.distributed.initialize(
            *arguments,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=heartbeat,
            # At a normal end all leave together; this bounds the wait for one that does not.
            shutdown_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        raise ConfigError(
            f"JAX cannot tell which processes belong to this run: {error}. Give --coordinator, "
            "--processes and --process, or IV2_MULTIHOST=0 for a run on this machine alone."
        ) from None
    except RuntimeError as error:
        raise PeerMissing(f"{text}\nJAX says: {str(error).splitlines()[0]}") from None
    _exit_instead_of_abort(
        f"process {jax.process_index()} of {jax.process_count()}: another process of the run was "
        "lost (the lines above say which); start all of them again, they go on from the last "
        "complete checkpoint"
    )
    if jax.process_index() == 0:
        logger.info("%d processes, %d devices", jax.process_count(), jax.device_count())


def _seconds(variable: str, default: int) -> int:
    """A time from the environment."""
    text = os.environ.get(variable, str(default))
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{variable}={text!r} must be a whole number of seconds, at least 1")
    return int(text)


def _wait_for_port(port: int) -> None:
    """Refuses a port that another program listens on; gRPC would share it without a word."""
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        with socket.socket(socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                return
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise ConfigError(
                        f"process 0 cannot listen on port {port}: {error.strerror}. Is another "
                        "run going on this machine? Give another port in --coordinator."
                    ) from None
        time.sleep(0.5)


def _wait_for_coordinator(join: Joining, seconds: float) -> None:
    """Waits until something listens at the coordinator's address."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection(join.address, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerMissing(
                    f"process {join.process} of {join.processes}: no answer at --coordinator "
                    f"{join.coordinator} within {seconds} s ({error.strerror or error}). Is the "
                    "address that of process 0, is process 0 started, and does a firewall let the "
                    "port through?"
                ) from None
        time.sleep(0.2)


_abort_handler: Any = None  # ctypes needs it kept


def _exit_instead_of_abort(text: str) -> None:
    """Has `abort()` say `text`, show where Python stood, and exit with 75.

    JAX's client aborts the process from one of its threads when a peer is lost and takes no
    callback from Python. A Python signal handler would never run: `abort` does not return to the
    interpreter.
    """
    global _abort_handler

    def handler(number: int) -> None:
        del number
        sys.stderr.write(f"\niv2: {text}\n")
        faulthandler.dump_traceback()
        leave(EXIT_RESTART)

    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    install = ctypes.CDLL(None).signal
    install.argtypes, install.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    install(signal.SIGABRT, ctypes.cast(_abort_handler, ctypes.c_void_p))


def leave(code: int) -> None:
    """Ends the process now, without waiting for other processes."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


@contextmanager
def leaving_on_error(name: str) -> Iterator[None]:
    """In a run of several processes an error ends this one at once, so that the others notice.

    The orderly way out would wait for processes that wait for this one. An error of a collective
    may be a peer's death: the coordination service has then its say first, which ends in 75.

    Args:
      name: The command, for the message.
    """
    try:
        yield
    except PeerMissing as error:
        sys.stderr.write(f"{name}: {error}\n")
        leave(EXIT_RESTART)
    except BaseException as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            sys.stderr.write(f"{name}: {error}\n")
            leave(2)
        sys.excepthook(type(error), error, error.__traceback__)
        lost = _tells_of_a_lost_peer(error)
        if lost or isinstance(error, jax.errors.JaxRuntimeError):
            sys.stderr.write(f"{name}: was another process lost? waiting for word of it\n")
            time.sleep(_seconds(HEARTBEAT_VARIABLE, 100) + 10)
        if lost:  # the word may have come before, as a barrier's error
            leave(EXIT_RESTART)
        leave(130 if isinstance(error, KeyboardInterrupt) else 1)


def _tells_of_a_lost_peer(error: BaseException) -> bool:
    """Whether an error, or one that it came from, is that of a connection to a process gone.

    A collective that fails as it is started comes as a ValueError, so the type tells nothing.
    """
    signs = ("Gloo", "Connection closed by peer", "Connection reset by peer", "heartbeat timeout")
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if any(sign in str(error) for sign in signs):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


class Hosts:
    """Small numbers that each process knows its own of: sums and maxima over all of them.

    With one process nothing goes to a device. With several it is one more tiny program a step,
    whose result is fetched with the step's metrics.

    Args:
      mesh: The run's mesh; every process must have devices in it.

    Raises:
      ConfigError: A process has none.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.alone = jax.process_count() == 1
        if self.alone:
            return
        local = mesh.local_devices
        if len({device.process_index for device in mesh.devices.flat}) < jax.process_count():
            raise ConfigError(
                f"the mesh {dict(mesh.shape)} leaves out some of {jax.process_count()} processes; "
                "raise mesh.max_devices (0 = all devices)"
            )
        self._rows = len(local)
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        whole = NamedSharding(mesh, PartitionSpec())
        self._both = jax.jit(lambda x: jax.numpy.stack([x.sum(0), x.max(0)]), out_shardings=whole)

    def share(self, **own: float) -> Shared:
        """Starts adding up this process's figures, none negative, with those of the others."""
        values = np.asarray(list(own.values()), np.float32)
        if self.alone:
            return Shared(tuple(own), np.stack([values, values]))
        rows = np.zeros((self._rows, len(values)), np.float32)
        rows[0] = values
        return Shared(
            tuple(own), self._both(jax.make_array_from_process_local_data(self._split, rows))
        )


@dataclass(frozen=True)
class Shared:
    """Sums and maxima on their way: (2, figures) on the devices, or here with one process."""

    names: tuple[str, ...]
    arrays: Any

    def get(self) -> tuple[dict[str, float], dict[str, float]]:
        """Waits for them: sums and maxima by name."""
        sums, maxima = np.asarray(self.arrays).tolist()
        return dict(zip(self.names, sums, strict=True)), dict(zip(self.names, maxima, strict=True))


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """A host array, the same in every process, laid out over the devices of all of them.

    `jax.device_put` would compare the processes' copies by sending them around: gigabytes of
    weights.
    """
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process; all of them must ask."""
    return flag if jax.process_count() == 1 else bool(np.any(gather(np.asarray([flag]))))


def gather(rows: np.ndarray) -> np.ndarray:
    """Rows of all processes, one process after the other; all must ask, with equal shapes."""
    if jax.process_count() == 1:
        return rows
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def check_same(text: str, complain: Callable[[list[int]], str]) -> None:
    """Refuses processes that were given different texts: they would wait for each other forever.

    Args:
      text: What must be the same everywhere.
      complain: Message from the numbers of the processes that differ from process 0.

    Raises:
      ConfigError: With that message.
    """
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)[None]
    every = gather(digest)
    others = [i for i, row in enumerate(every) if not np.array_equal(row, every[0])]
    if others:
        raise ConfigError(complain(others))
