"""Answers on disk, one JSON line each, so that a run that was killed goes on where it was.

The first line says what the answers depend on; a file of other weights or another prompt is refused
rather than mixed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError, DataError
from iv2_jax.eval.answers_prompts import Question

_SAMPLED = 64  # numbers of an array that go into the fingerprint of weights


def fingerprint(params: Any) -> str:
    """A number that tells weights apart: of some numbers of every array, spread over it."""
    mark = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(params):
        values = np.asarray(leaf).reshape(-1)
        step = max(1, len(values) // _SAMPLED)
        mark.update(str(leaf.shape).encode())
        mark.update(np.ascontiguousarray(values[::step]).tobytes())
    return mark.hexdigest()


def digest(question: Question) -> str:
    """A number that changes with all that is asked."""
    text = json.dumps(config_lib.to_dict(question), sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


class KeptAnswers:
    """The answers of one model under one way to ask; close it, or use it as a context.

    Attributes:
      found: question's name -> record, of those asked before this process and since.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        """Opens a file, or makes it; None keeps answers in memory alone.

        Args:
          path: the file; its folder is made.
          settings: what the answers depend on, as plain values.

        Raises:
          ConfigError: the file's answers were given under other settings.
          DataError: it cannot be read or written, or is another file.
        """
        self.found: dict[str, dict[str, Any]] = {}
        self._file = None
        if path is None:
            return
        self._path = Path(path)
        settings = json.loads(json.dumps(settings))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read(settings) if self._path.exists() else 0
            self._file = self._path.open("a", encoding="utf-8")
            # What a killed process left of a line.
            self._file.truncate(whole)
            if not whole:
                self._write({"settings": settings})
        except OSError as e:
            raise DataError(f"{path}: cannot be used for answers: {e.strerror}") from e

    def known(self, question: Question) -> dict[str, Any] | None:
        """The record of a question that was asked; None if it is to be asked (again)."""
        record = self.found.get(question.id)
        if record is None or record["digest"] != digest(question) or record.get("reason"):
            return None
        return record

    def add(self, question: Question, values: Mapping[str, Any]) -> None:
        """Keeps an answer; it is on disk, but for the machine's own buffers, when this returns."""
        shown = {
            "id": question.id,
            "digest": digest(question),
            "task": question.task,
            "clip": None if question.medium is None else config_lib.to_dict(question.medium),
            "question": question.text,
            "options": list(question.options),
            "answer": question.answer,
        }
        self.found[question.id] = {**shown, **values}
        if self._file is not None:
            self._write(self.found[question.id])

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> KeptAnswers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        """Adds a line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _read(self, settings: Mapping[str, Any]) -> int:
        """Takes what is there over; gives the bytes of whole lines."""
        lines = self._path.read_bytes().split(b"\n")[:-1]
        if not lines:  # killed before the first line was whole
            return 0
        records = [self._record(number, line) for number, line in enumerate(lines, start=1)]
        self._check(records[0], settings)
        self.found = {record["id"]: record for record in records[1:]}
        return sum(len(line) + 1 for line in lines)

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        """The settings, in the first line, or an answer."""
        try:
            record = json.loads(line)
            if number == 1:
                return dict(record["settings"])
            return {**record, "id": record["id"], "digest": record["digest"]}
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(
                f"{self._path}:{number}: is no answer of ours ({e!r}); name another file"
            ) from e

    def _check(self, kept: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Refuses answers that were given otherwise."""
        for name in sorted({*kept, *settings}):
            if kept.get(name) != settings.get(name):
                raise ConfigError(
                    f"{self._path} has answers with {name}={kept.get(name)!r}, now it is "
                    f"{settings.get(name)!r}: name another folder with --answers, or delete the "
                    "file"
                )
