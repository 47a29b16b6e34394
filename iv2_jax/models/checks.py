"""Checks that the configs of several models share; each names the field that is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from iv2_jax.errors import ConfigError
from iv2_jax.models.block_stack import REMAT_POLICIES


def require_sizes(config: Any, fields: Iterable[str]) -> None:
    """Raises ConfigError unless every named field is a whole number of at least 1."""
    for field in fields:
        value = getattr(config, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{field}={value!r}: a whole number of at least 1 is needed")


def require_rates(config: Any, fields: Iterable[str]) -> None:
    """Raises ConfigError unless every named field is a probability below 1."""
    for field in fields:
        if not 0.0 <= getattr(config, field) < 1.0:
            raise ConfigError(f"{field}={getattr(config, field)}: must be in [0, 1)")


def require_remat(config: Any) -> None:
    """Raises ConfigError unless the field `remat` names a policy."""
    if config.remat not in REMAT_POLICIES:
        raise ConfigError(f"remat={config.remat!r}: choose one of {', '.join(REMAT_POLICIES)}")
