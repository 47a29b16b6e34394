"""One process of a test run: `iv2` with the tests' own stages and teachers.

    python -m tests.multihost.worker train --config FILE --workdir FOLDER [--coordinator ...]

`IV2_TEST_PAUSE` slows every batch of the toy stage down by so many seconds; `IV2_TEST_FILE_BYTES`
limits the size of files, which to the file system's users is a disk that is full.
"""

from __future__ import annotations

import os
import resource
import time
from typing import NoReturn

from iv2_jax import cli
from iv2_jax.models import teachers
from iv2_jax.train import stage
from tests.train import toy


def main() -> NoReturn:
    """Sets the run up and runs it."""
    stage.STAGES["toy"] = "tests.train.toy:ToyConfig"
    teachers.TEACHERS["tiny"] = "tests.train.tiny:TinyTeacher"
    pause, original = float(os.environ.get("IV2_TEST_PAUSE", "0")), toy.ToyStage._batch

    def batch(self: toy.ToyStage, step: int) -> dict:
        time.sleep(pause)
        return original(self, step)

    toy.ToyStage._batch = batch
    if limit := int(os.environ.get("IV2_TEST_FILE_BYTES", "0")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    cli.entry()


if __name__ == "__main__":
    main()
