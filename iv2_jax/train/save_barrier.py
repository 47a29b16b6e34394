"""Where the processes of a run meet while each writes its part of a checkpoint.

Orbax has them wait for each other twice, when all parts are written and when process 0 has given
the whole its name. One that could not write its part never comes, and the others would wait for the
time-out of a write, ten minutes. Here it comes all the same, says that it failed, and all give the
checkpoint up at once.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import jax

logger = logging.getLogger(__name__)

# Orbax's names of the two, parts of the keys that it gives; other keys are as they come.
_PLACES = ("async_write_complete", "async_commit_complete")
# It meets here before a write and after it, whether it failed or not.
_ENDS = "set_value_start"


class OtherProcessFailed(OSError):
    """Another process could not write its part of a checkpoint."""


class SaveBarrier:
    """Orbax's `barrier_sync_fn`, for all saves of a run."""

    def __init__(self) -> None:
        # JAX has no public way to its coordination service; Orbax takes it from there too.
        from jax._src.distributed import global_state

        self._client: Any = global_state.client
        self._lock = threading.Lock()
        self._save = 0
        self._left: list[str] = []
        self._ends = 0

    def begin(self) -> None:
        """A save begins; all processes must call it equally often."""
        with self._lock:
            self._save += 1
            self._left, self._ends = list(_PLACES), 0

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes.

        Args:
          key: Name of the place.
          timeout_ms: How long.

        Raises:
          OtherProcessFailed: One of them could not write its part.
          JaxRuntimeError: They did not come in time.
        """
        place = next((place for place in _PLACES if place in key), None)
        if place is None:
            self._ends += _ENDS in key
            if _ENDS in key and self._ends > 1:
                self._own_end(timeout_ms)
            self._client.wait_at_barrier(key, timeout_ms)
            return
        self._left.remove(place)
        self._client.wait_at_barrier(f"{self._name}/{place}", timeout_ms)
        failed = self._client.key_value_dir_get(f"{self._name}/failed")
        if failed:
            numbers = ", ".join(sorted(value for _, value in failed))
            raise OtherProcessFailed(f"process {numbers} could not write, see there")

    @property
    def _name(self) -> str:
        return f"iv2_save/{self._save}"

    def _own_end(self, timeout_ms: int) -> None:
        """The write has ended; if that was by an error, the others wait somewhere."""
        if self._left:
            number = str(jax.process_index())
            self._client.key_value_set(f"{self._name}/failed/{number}", number)
        while self._left:
            self._client.wait_at_barrier(f"{self._name}/{self._left.pop(0)}", timeout_ms)
