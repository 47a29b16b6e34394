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
from iv2_jax.kernels import short_plan

logger = logging.getLogger(__name__)

# Forms that end in "_interpret" run a TPU kernel step by step in XLA, on any platform (tests).
BACKENDS = ("xla", "short", "short_interpret", "splash", "splash_interpret", "cudnn")
# Other names that a user may know a kernel by.
ALIASES = {
    "plain": "xla",
    "flash": "splash",
    "pallas": "splash",
    "flash_interpret": "splash_interpret",
    "pallas_interpret": "splash_interpret",
}
ENVIRONMENT = "IV2_ATTENTION"
# Below these the padded tiles of the kernels cost more than the scores they save. Estimates: no
# TPU was at hand to measure on.
KERNEL_MIN_QUERIES = 128
SHORT_MIN_KEYS = 128
SPLASH_MIN_KEYS = 1024

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


def device_kind() -> str | None:
    """The kind of device that is traced for, such as "TPU v5"; None where nothing tells.

    That of the mesh in the context, or the default devices' if they are of the platform.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.device_kind
    return jax.devices()[0].device_kind if target_platform() == jax.default_backend() else None


def target_platform() -> str:
    """The platform that is traced for: that of `trace_for`, or the default devices'."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def prefer_backend(name: str) -> Iterator[None]:
    """Has every attention traced inside use `name` where it can, plain XLA elsewhere.

    The choice is made while tracing: a function that is already compiled keeps its own. The
    environment variable `IV2_ATTENTION` does the same for a whole process.

    Args:
        name: one of `BACKENDS` or `ALIASES`, or 'auto'.

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

    On TPU the kernel for short sequences up to `short_plan.MAX_LENGTH` keys and splash attention
    above, on GPU cuDNN's, where they can do what is asked (`obstacle`) and pay; plain XLA
    otherwise.

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
    backend = _known(backend, "attention backend")
    if backend != "auto":
        problem = problem or obstacle(backend, q, k, bias=bias, mask=mask)
        if problem and backend != "xla":
            raise ValueError(f"attention backend {backend!r}: {problem}; use 'xla' or 'auto'")
        return backend
    preferred = _preferred.get()
    if preferred == "auto":
        preferred = _known(os.environ.get(ENVIRONMENT, "auto"), f"${ENVIRONMENT}")
    platform = platform or target_platform()
    candidates = {"tpu": ("short", "splash"), "gpu": ("cudnn",)}.get(platform, ())
    if preferred != "auto":
        candidates = () if preferred == "xla" else (preferred,)
    choice, problems = "xla", []
    for name in candidates:
        why = problem or obstacle(name, q, k, bias=bias, mask=mask)
        if not why and preferred == "auto" and name != "cudnn":
            why = _not_worth_it(name, q, k) or _cannot_split()
        if not why:
            choice = name
            break
        problems.append(f"not {name}: {why}")
    case = f"{platform}, {q.shape[1]} queries, {k.shape[1]} keys, heads of {q.shape[3]}, {q.dtype}"
    _log_once(f"attention ({case}): " + "; ".join([choice, *problems]))
    return choice


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
    return None if backend.startswith("splash") else _short_obstacle(backend, q, k)


def _short_obstacle(
    backend: str, q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct
) -> str | None:
    """The limits of the kernel for short sequences."""
    longest = max(q.shape[1], k.shape[1])
    if longest > short_plan.MAX_LENGTH:
        return f"{longest} tokens are more than {short_plan.MAX_LENGTH}"
    dtype = jnp.result_type(q.dtype, k.dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the kernel takes float32 and bfloat16, not {dtype}"
    vmem = short_plan.vmem_bytes(device_kind(), backend == "short_interpret")
    shape = (q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    if short_plan.plan(*shape, itemsize=dtype.itemsize, causal=False, vmem=vmem) is None:
        return f"a head does not fit {vmem >> 20} MiB of on-chip memory"
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
    name: str, q: jax.Array | jax.ShapeDtypeStruct, k: jax.Array | jax.ShapeDtypeStruct
) -> str | None:
    """Why a TPU kernel would not pay, or None."""
    least = SHORT_MIN_KEYS if name == "short" else SPLASH_MIN_KEYS
    if q.shape[1] < KERNEL_MIN_QUERIES or k.shape[1] < least:
        return f"fewer than {KERNEL_MIN_QUERIES} queries or {least} keys"
    return None


def _cannot_split() -> str | None:
    """Why a Pallas kernel cannot be laid out on the devices, or None."""
    if jax.device_count() > 1 and jax.sharding.get_abstract_mesh().empty:
        return "several devices and no mesh in the context (jax.set_mesh)"
    return None


def _known(name: str, where: str) -> str:
    """The backend that `name` stands for, or 'auto'.

    Raises:
        ConfigError: it stands for none.
    """
    name = ALIASES.get(name, name)
    if name != "auto" and name not in BACKENDS:
        names = ", ".join(BACKENDS)
        raise ConfigError(f"{where} is {name!r}: choose 'auto' or one of {names}")
    return name


@functools.cache
def _log_once(message: str) -> None:
    """Logs a message the first time it comes."""
    logger.info(message)
