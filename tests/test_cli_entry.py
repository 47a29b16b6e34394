"""The command ends in bounded time, whatever its libraries' threads wait for."""

from __future__ import annotations

import subprocess
import sys
import time

SCRIPT = """
import threading, time
from iv2_jax import cli
cli._EXIT_SECONDS = 0.5
cli.main = lambda: 75
threading.Thread(target=time.sleep, args=(60,), name="writer").start()
cli.entry()
"""


def test_a_thread_that_waits_does_not_hold_the_command():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 75
    assert "without waiting any longer for threads" in done.stderr
    assert "writer" in done.stderr
    assert time.monotonic() - start < 50
