"""What the benchmarks against plain PyTorch share: weights, inputs and the four ways to run it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from side_by_side import Variant


def random_params(abstract: Any, fixed: Mapping[str, float] | None = None) -> Any:
    """Weights both sides start from, of the size of the models' own initialisation.

    Args:
        abstract: tree of shapes.
        fixed: values of parameters by the last part of their names; scales are 1 and LayerScale
            1e-5 without being named.
    """
    import jax

    from iv2_jax.parallel.rules import path_name

    rng = np.random.default_rng(1)
    fixed = {"scale": 1.0, "gamma": 1e-5, **(fixed or {})}

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path_name(path).rsplit("/", 1)[-1]
        if name in fixed:
            return np.full(leaf.shape, fixed[name], np.float32)
        return 0.02 * rng.normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def load(model: Any, keys: Any, params: Any, *, strict: bool = True) -> Any:
    """Puts our weights into a torch module by its table of keys; returns the module."""
    import torch

    from iv2_jax.interop import torch_keys

    state = torch_keys.to_torch(params, keys)
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    model.load_state_dict(tensors, strict=strict)
    return model


def clips(video: np.ndarray) -> Any:
    """Our video `(B, T, H, W, 3)` as a tensor `(B, 3, T, H, W)`."""
    import torch

    return torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())


def hidden(visible: np.ndarray, num_tokens: int) -> Any:
    """Our visible tokens int `(B, N)` as the bool mask `(B, num_tokens)` of hidden ones."""
    import torch

    mask = np.ones((len(visible), num_tokens), bool)
    np.put_along_axis(mask, visible, False, axis=1)
    return torch.from_numpy(mask)


def variants(args: argparse.Namespace, make: Callable[..., Callable[[], float]]) -> list[Variant]:
    """PyTorch's rows: plain and fused attention, eager and compiled.

    Args:
        args: those of `side_by_side.add_arguments`; none with `only_ours`.
        make: `(fused=, compiled=) -> step`.
    """
    if args.only_ours:
        return []
    import torch

    torch.set_num_threads(args.threads)
    rows = []
    for compiled in (False,) if args.no_compile else (False, True):
        for fused in (False, True):
            name = f"torch {'sdpa' if fused else 'plain'} {'compile' if compiled else 'eager'}"
            rows.append(Variant(name, make(fused=fused, compiled=compiled)))
    return rows


def products(shapes: list[tuple[int, ...]], threads: int) -> Variant:
    """The machine's own limit: a step's matrix products and nothing else, by torch's sgemm.

    Args:
        shapes: `(count, *batch, M, K, N)` of each; operands and results are made beforehand.
        threads: for torch.
    """
    import torch

    torch.set_num_threads(threads)
    work = []
    for count, *batch, m, k, n in shapes:
        a, b, out = (torch.randn(*batch, *size) for size in ((m, k), (k, n), (m, n)))
        work.append((count, a, b, out))

    def take() -> float:
        for count, a, b, out in work:
            for _ in range(count):
                torch.matmul(a, b, out=out)
        return float("nan")

    return Variant("sgemm alone", take, has_loss=False)


def gigaflop(shapes: list[tuple[int, ...]]) -> float:
    """Operations of such products, 2 for a multiply and add, in 1e9."""
    return sum(2.0 * float(np.prod(shape)) for shape in shapes) / 1e9
