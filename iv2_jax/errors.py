"""Errors that are the user's to mend: printed without a traceback, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, file or key that the message names and tells how to mend."""


class ConfigError(UserError, ValueError):
    """A config with an unknown field, a wrong type or values that contradict each other."""


class DataError(UserError, ValueError):
    """A data file that cannot be used; the message names the file, the line and the field."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that does not fit what was asked of it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint such as `; did you mean 'depth'?`, or the known names when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
