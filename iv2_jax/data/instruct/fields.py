"""Checks of the fields of a record that every format shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iv2_jax.data.records import FieldError, misspelt, show


def check_spelling(item: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuses keys that are nearly one of `known`; others are other programs'."""
    folded = {name.lower(): name for name in known}
    for key in item:
        if key in known:
            continue
        close = folded.get(key.lower()) or misspelt(key, known)
        if close and close not in item:
            raise FieldError(key, f"unknown field; did you mean {close!r}?")


def identifier(item: Mapping[str, Any]) -> str:
    """The record's name."""
    value = item.get("id", "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise FieldError("id", f"must be a text or a whole number, is {show(value)}")
    return str(value)


def text(value: Any, field: str) -> str:
    """A text."""
    if not isinstance(value, str):
        raise FieldError(field, f"must be a text, is {show(value)}")
    return value


def path(value: Any, field: str) -> str:
    """A path that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise FieldError(field, f"must be the path of a file, is {show(value)}")
    return value


def listed(value: Any, field: str, what: str) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        raise FieldError(field, f"must be a list of {what}, at least one, is {show(value)}")
    return value


def entry(value: Any, field: str, known: tuple[str, ...], needed: tuple[str, ...]) -> dict:
    """An object with these keys, spelt right; other programs' keys may be there too."""
    if not isinstance(value, dict):
        raise FieldError(field, f"must be an object with {', '.join(known)}, is {show(value)}")
    for key in value:
        short = (k for k in known if key.lower().startswith(k.lower()) or k == key.lower())
        close = "" if key in known else misspelt(key, known) or next(short, "")
        if close and close not in value:
            raise FieldError(f"{field}.{key}", f"unknown field; did you mean {close!r}?")
    for key in needed:
        if key not in value:
            raise FieldError(
                f"{field}.{key}", f"is missing; there are {', '.join(value) or 'none'}"
            )
    return value
