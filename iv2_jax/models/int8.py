"""Kernels kept in int8, and the products that read them.

A kernel is rounded once, with one scale for each output channel, and kept as `Int8Kernel`: half
the bytes of bfloat16. A product then rounds its input as well, with one scale for each token, and
is one of int8 by int8; or it takes the kernel back to the compute dtype. Rounding and products are
qwix's (Google's quantization library for JAX), which the extra `int8` installs.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from iv2_jax.errors import ConfigError

# What is int8: nothing; kernels in memory; kernels in memory and both sides of their products.
Int8 = Literal["none", "weights", "products"]


@flax.struct.dataclass
class Int8Kernel:
    """A kernel of shape `(*stacked, *in, *out)` in int8; stands where its float array stood.

    Attributes:
        values: int8, of the kernel's shape; the largest of a channel stands for 127.5 steps.
        scale: float32 `(*stacked, 1, ..., *out)`, ones for the input axes; kernel = values * scale.
        products: whether inputs are rounded too, so that products are of int8 by int8.
    """

    values: jax.Array
    scale: jax.Array
    products: bool = flax.struct.field(pytree_node=False)

    def flat(self, num_in: int) -> Int8Kernel:
        """An unstacked kernel as one of two axes: all input axes, all output axes."""
        size = math.prod(self.values.shape[:num_in])
        return self.replace(values=self.values.reshape(size, -1), scale=self.scale.reshape(1, -1))


def require_library(field: str) -> None:
    """Checks that the quantization library can be imported.

    Args:
        field: the config field that asks for it.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("qwix") is None:
        raise ConfigError(
            f"{field} needs the library qwix, which the extra `int8` installs: "
            "pip install 'iv2_jax[int8]'"
        )


def contract(x: jax.Array, kernel: Any, num_axes: int, dtype: str) -> jax.Array:
    """Contracts the last axes of `x` with the first of `kernel`.

    Args:
        x: `(..., *in)`.
        kernel: `(*in, *out)`, an array or an `Int8Kernel`.
        num_axes: number of contracted axes.
        dtype: dtype of the result, and of the operands where they are not int8.

    Returns:
        `(..., *out)`.
    """
    if not isinstance(kernel, Int8Kernel):
        return jnp.tensordot(x.astype(dtype), kernel.astype(dtype), axes=num_axes)
    import qwix

    out = kernel.values.shape[num_axes:]
    # One contracted axis: heads and head_dim apart cost the TPU copies in float32.
    x = x.reshape(*x.shape[: x.ndim - num_axes], -1)
    values = kernel.values.reshape(x.shape[-1], *out)
    stored = qwix.QArray(values, kernel.scale.reshape(1, *out))
    if not kernel.products:
        # By a float32 scale first: a scale in bfloat16 would shift a whole channel.
        return jnp.tensordot(x.astype(dtype), qwix.dequantize(stored).astype(dtype), axes=1)
    # Rounded from float32: bfloat16 has no halves between 64 and 127.
    tokens = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=range(x.ndim - 1))
    contracted = (((x.ndim - 1,), (0,)), ((), ()))
    return qwix.dot_general(tokens, stored, contracted, preferred_element_type=jnp.dtype(dtype))


def quantize(kernel: jax.Array, num_in: int, num_out: int, *, products: bool) -> Int8Kernel:
    """Rounds a kernel to int8; traceable.

    Args:
        kernel: `(*stacked, *in, *out)` float.
        num_in: number of input axes.
        num_out: number of output axes.
        products: see `Int8Kernel`.
    """
    import qwix

    contracted = _contracted(kernel.ndim, num_in, num_out)
    kept = [axis for axis in range(kernel.ndim) if axis not in contracted]
    rounded = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=kept)
    return Int8Kernel(rounded.qvalue, rounded.scale, products)


def quantize_host(kernel: np.ndarray, num_in: int, num_out: int, *, products: bool) -> Int8Kernel:
    """The same of a host array, to host arrays: a slice of the first stacked axis at a time.

    A stack of 48 layers in float32 would need several times what the model takes.
    """
    run = functools.partial(_quantize_jit, num_in=num_in, num_out=num_out, products=products)
    if kernel.ndim == num_in + num_out:
        return jax.device_get(run(kernel))
    slices = [jax.device_get(run(part)) for part in kernel]
    return jax.tree.map(lambda *parts: np.stack(parts), *slices)


_quantize_jit = jax.jit(quantize, static_argnames=("num_in", "num_out", "products"))


def quantize_boxed(kernel: Any, num_in: int, num_out: int, *, products: bool) -> Int8Kernel:
    """`quantize` of a parameter with or without logical axis names, which both parts keep."""
    rounded = quantize(meta.unbox(kernel), num_in, num_out, products=products)
    if not isinstance(kernel, meta.Partitioned):
        return rounded
    contracted = _contracted(rounded.values.ndim, num_in, num_out)
    # An axis of one value is not split.
    names = tuple(None if i in contracted else name for i, name in enumerate(kernel.names))
    scale = kernel.replace(value=rounded.scale, names=names)
    return rounded.replace(values=kernel.replace(value=rounded.values), scale=scale)


def _contracted(ndim: int, num_in: int, num_out: int) -> range:
    """The input axes of a kernel of `ndim` axes."""
    return range(ndim - num_out - num_in, ndim - num_out)
