"""Which attention kernel runs: chosen by platform and shape, or forced."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from iv2_jax.errors import ConfigError

logger = logging.getLogger(__name__)

BACKENDS = ("xla", "pallas", "pallas_interpret", "cudnn")
ENVIRONMENT = "IV2_ATTENTION"
# Below these the padded blocks of the kernel cost more than the scores they save. Estimates: no
# TPU was at hand to measure on.
PALLAS_MIN_QUERIES = 128
PALLAS_MIN_KEYS = 1024

_preferred = contextvars.ContextVar("attention_backend", default="auto")
_platform = contextvars.ContextVar("platform", default="")


@contextlib.contextmanager
def trace_for(platform: str) -> Iterator[None]:
    """Has everything traced inside choose as it would on `platform`, whatever runs here.

    For programs that are compiled ahead of time for devices that are only described.

    Args:
        platform: 'cpu', 'gpu' or 'tpu'.
    """
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def target_platform() -> str:
    """The platform that is traced for: that of `trace_for`, or the default devices'."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def prefer_backend(name: str) -> Iterator[None]:
    """Has every attention traced inside use `name` where it can, plain XLA elsewhere.

    The choice is made while tracing: a function that is already compiled keeps its own. The
    environment variable `IV2_ATTENTION` does the same for a whole process.

    Args:
        name: one of `BACKENDS`, or 'auto'.

    Raises:
        ConfigError: the name is not known.
    """
    token = _preferred.set(_known(name, "attention backend"))
    try:
        yield
    finally:
        _preferred.reset(token)


def choose_backend(
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    *,
    bias: jax.Array | jax.ShapeDtypeStruct | None = None,
    mask: jax.Array | jax.ShapeDtypeStruct | None = None,
    backend: str = "auto",
    platform: str | None = None,
    problem: str | None = None,
) -> str:
    """Picks the kernel of one attention; the choice is logged, each only once.

    On TPU the Pallas kernel from `PALLAS_MIN_KEYS` keys, on GPU cuDNN's, where they can do what is
    asked (`obstacle`); plain XLA otherwise.

    Args:
        q: `(B, N, h, d)`; only shape and dtype are looked at.
        k: `(B, M, g, d)`.
        bias: additive bias of the scores or None.
        mask: bool mask or None.
        backend: 'auto', or the kernel to use whatever the platform.
        platform: 'cpu', 'gpu' or 'tpu'; None for `target_platform()`.
        problem: why only plain XLA can do it, or None.

    Returns:
        One of `BACKENDS`.

    Raises:
        ConfigError: the backend is not known.
        ValueError: the backend asked for by `backend` cannot do it; the message says why.
    """
    if _known(backend, "attention backend") != "auto":
        problem = problem or obstacle(backend, q, k, bias=bias, mask=mask)
        if problem and backend != "xla":
            raise ValueError(f"attention backend {backend!r}: {problem}; use 'xla' or 'auto'")
        return backend
    preferred = _preferred.get()
    if preferred == "auto":
        preferred = _known(os.environ.get(ENVIRONMENT, "auto"), f"${ENVIRONMENT}")
    platform = platform or target_platform()
    choice = preferred
    if preferred == "auto":
        choice = {"tpu": "pallas", "gpu": "cudnn"}.get(platform, "xla")
    if choice == "xla":
        problem = None
    problem = problem or obstacle(choice, q, k, bias=bias, mask=mask)
    if not problem and preferred == "auto" and choice == "pallas":
        problem = _not_worth_it(q, k) or _cannot_split()
    case = f"{platform}, {q.shape[1]} queries, {k.shape[1]} keys, heads of {q.shape[3]}, {q.dtype}"
    _log_once(f"attention ({case}): " + (f"xla, not {choice}: {problem}" if problem else choice))
    return "xla" if problem else choice


def obstacle(
    backend: str,
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    *,
    bias: jax.Array | jax.ShapeDtypeStruct | None = None,
    mask: jax.Array | jax.ShapeDtypeStruct | None = None,
) -> str | None:
    """Why a kernel cannot compute an attention, or None when it can (arguments as above)."""
    if backend == "xla":
        return None
    if bias is not None:
        return "the kernel adds no bias to the scores"
    if backend == "cudnn":
        return _cudnn_obstacle(q, k, mask)
    if mask is not None and mask.shape[1:3] != (1, 1):
        return f"the kernel hides keys by sample only, the mask is {mask.shape}"
    return None


def _cudnn_obstacle(
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    mask: jax.Array | jax.ShapeDtypeStruct | None,
) -> str | None:
    """The limits of cuDNN's fused attention as `jax.nn.dot_product_attention` states them."""
    if jax.default_backend() != "gpu":
        return "there is no GPU"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {q.dtype}"
    capability = float(getattr(jax.devices("gpu")[0], "compute_capability", "0"))
    largest = 256 if capability >= 9.0 else 128
    if capability < 8.0:
        return f"the GPU's compute capability {capability} is below 8.0"
    if q.shape[3] > largest or q.shape[3] % 8:
        return f"heads of {q.shape[3]} are not a multiple of 8 up to {largest}"
    if mask is not None and (q.shape[1] % 2 or k.shape[1] % 2):
        return "with a mask the kernel needs even lengths"
    return None


def _not_worth_it(
    q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct
) -> str | None:
    """Why the Pallas kernel would not pay, or None."""
    if q.shape[1] < PALLAS_MIN_QUERIES or k.shape[1] < PALLAS_MIN_KEYS:
        return f"fewer than {PALLAS_MIN_QUERIES} queries or {PALLAS_MIN_KEYS} keys"
    return None


def _cannot_split() -> str | None:
    """Why a Pallas kernel cannot be laid out on the devices, or None."""
    if jax.device_count() > 1 and jax.sharding.get_abstract_mesh().empty:
        return "several devices and no mesh in the context (jax.set_mesh)"
    return None


def _known(name: str, where: str) -> str:
    """Returns `name` if it names a backend or 'auto'.

    Raises:
        ConfigError: it does not.
    """
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"{where} is {name!r}: choose 'auto' or one of {', '.join(BACKENDS)}")
    return name


@functools.cache
def _log_once(message: str) -> None:
    """Logs a message the first time it comes."""
    logger.info(message)
