"""Entries that tie one parameter of ours to its torch tensors, and strict conversion both ways.

An entry's layout, such as `D s h d -> (s h d) D`, has our axes on the left and the torch axes on
the right; axes in parentheses are flattened together and a layout without an arrow is the same on
both sides. Both shapes, the permutation and its inverse follow from it. The tables of the models
are in `torch_keys`.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from flax.core import meta

from iv2_jax.errors import CheckpointError

logger = logging.getLogger(__name__)

Rule = tuple[str, str, str]  # path of ours, torch key, layout


class MisfitError(CheckpointError):
    """Names or shapes that do not fit the model that was asked for."""


_LISTED = 10  # keys shown of each kind of misfit


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours and the torch tensor, or the numbered torch tensors, it stands for.

    Attributes:
        path: path of ours, such as `blocks/attn/qkv/kernel`.
        torch_keys: torch keys; one for each slice of our leading axis if `stacked`, else one.
        stacked: whether our array stacks the torch tensors on a leading axis.
        shape: shape of our array, the leading axis included.
        permutation: our axes (of one slice) in torch order, before flattening.
        torch_shape: shape of each torch tensor.
        copies: torch keys that hold the same tensor again (tied weights). All are written; a file
            may lack any of them but one, and they may not differ.
        constant: makes a tensor that is no parameter (a buffer of the original); `path` is empty.
            It is written, and left out on reading.
        torch_dtype: dtype of torch tensors that are whole numbers where our array is float32.
    """

    path: str
    torch_keys: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    permutation: tuple[int, ...]
    torch_shape: tuple[int, ...]
    copies: tuple[str, ...] = ()
    constant: Callable[[], np.ndarray] | None = None
    torch_dtype: str | None = None

    @property
    def all_keys(self) -> tuple[str, ...]:
        """The torch keys and their copies."""
        return self.torch_keys + self.copies

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of what one torch tensor holds, in our layout."""
        return self.shape[1:] if self.stacked else self.shape

    def to_torch(self, array: Any) -> list[Any]:
        """Gives the torch tensors (NumPy, or abstract if `array` is) in the order of the keys."""
        if isinstance(array, jax.ShapeDtypeStruct):
            abstract = jax.ShapeDtypeStruct(self.torch_shape, self.torch_dtype or array.dtype)
            return [abstract] * len(self.torch_keys)
        slices = np.asarray(array) if self.stacked else np.asarray(array)[None]
        return [
            # Not ascontiguousarray: it makes a vector of a scalar.
            np.asarray(
                part.transpose(self.permutation).reshape(self.torch_shape),
                dtype=self.torch_dtype,
                order="C",
            )
            for part in slices
        ]

    def from_torch(self, tensors: Sequence[Any], dtype: Any = None) -> Any:
        """Gives our array (NumPy, or abstract if the tensors are) from the torch tensors."""
        if isinstance(tensors[0], jax.ShapeDtypeStruct):
            dtype = self.own_dtype([tensors[0].dtype]) if dtype is None else dtype
            return jax.ShapeDtypeStruct(self.shape, dtype)
        if dtype is None:
            dtype = self.own_dtype([tensor.dtype for tensor in tensors])
        out = np.empty((len(tensors), *self.slice_shape), dtype)
        for index, tensor in enumerate(tensors):  # one at a time: the file may be lazily read
            out[index] = self.slice_from_torch(tensor)
        return out if self.stacked else out[0]

    def own_dtype(self, given: Iterable[Any]) -> np.dtype:
        """The dtype of our array when the torch tensors' dtypes are kept."""
        return np.dtype(np.float32) if self.torch_dtype else np.result_type(*given)

    def slice_from_torch(self, tensor: Any) -> np.ndarray:
        """Gives one torch tensor's values in our layout, a view where that can be."""
        split = tuple(self.slice_shape[axis] for axis in self.permutation)
        return np.asarray(tensor).reshape(split).transpose(np.argsort(self.permutation))


def torch_shapes(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Gives `{torch key: shape}` of a whole model, without allocating anything."""
    return {key: entry.torch_shape for entry in entries for key in entry.all_keys}


def abstract_params(entries: Iterable[Entry], dtype: Any = np.float32) -> dict[str, Any]:
    """Gives our parameter tree as `jax.ShapeDtypeStruct`s, without allocating anything."""
    flat = {entry.path: jax.ShapeDtypeStruct(entry.shape, dtype) for entry in parameters(entries)}
    return traverse_util.unflatten_dict(flat, sep="/")


def to_torch(params: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """Turns our parameters into the original's state dict.

    Args:
        params: nested dict of arrays; `jax.ShapeDtypeStruct` leaves give abstract tensors.
        entries: the model's entries.

    Returns:
        `{torch key: NumPy array}` in the order of the entries, the dtype of our parameters.

    Raises:
        CheckpointError: a parameter is missing, unexpected or of another shape; all are listed.
    """
    return dict(torch_items(params, entries))


def torch_items(params: Mapping[str, Any], entries: Sequence[Entry]) -> Iterator[tuple[str, Any]]:
    """Gives the original's tensors one after the other; arguments and errors as of `to_torch`."""
    flat = traverse_util.flatten_dict(meta.unbox(dict(params)), sep="/")
    _check(
        {path: tuple(np.shape(value)) for path, value in flat.items()},
        {entry.path: entry.shape for entry in parameters(entries)},
        "parameters do not fit the model",
    )
    for entry in entries:
        if entry.constant is not None:
            yield entry.torch_keys[0], entry.constant()
            continue
        parts = entry.to_torch(flat[entry.path])
        # A copy is the same object: whoever writes the tensors may share them too.
        yield from zip(entry.all_keys, parts + parts[:1] * len(entry.copies), strict=True)


def from_torch(
    tensors: Mapping[str, Any],
    entries: Sequence[Entry],
    *,
    ignore: Mapping[str, str] | None = None,
    dtype: Any = None,
    source: str = "state dict",
) -> dict[str, Any]:
    """Turns a state dict of the original into our parameters; strict.

    Args:
        tensors: `{torch key: array}`. Values need `shape`, `dtype` and `np.asarray`; they are read
            one at a time, so a lazily read file never stands in memory twice.
        entries: the model's entries.
        ignore: `{regular expression of whole keys: reason}` for tensors knowingly left out; each
            reason is logged with its count. A key that an entry wants is never ignored.
        dtype: dtype of the result; None keeps each tensor's own.
        source: what the message calls the tensors, such as the file's name.

    Returns:
        Nested dict of NumPy arrays (abstract where the tensors are).

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape; all are listed.
    """
    flat = {}
    for entry, keys in plan(tensors, entries, ignore=ignore, source=source):
        flat[entry.path] = entry.from_torch(_Lazy(tensors, keys), dtype)
        check_copies(entry, keys[0], tensors, source)
    return traverse_util.unflatten_dict(flat, sep="/")


def plan(
    tensors: Mapping[str, Any],
    entries: Sequence[Entry],
    *,
    ignore: Mapping[str, str] | None = None,
    source: str = "state dict",
) -> list[tuple[Entry, tuple[str, ...]]]:
    """Accounts for every key, by names and shapes alone: no value is read.

    Args:
        tensors: `{torch key: array}`; values need `shape`.
        entries: the model's entries.
        ignore: as in `from_torch`.
        source: as in `from_torch`.

    Returns:
        Each parameter's entry with the keys it is to be read from.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape; all are listed.
    """
    known = torch_shapes(entries)
    dropped = _ignored([key for key in tensors if key not in known], ignore or {}, source)
    found = {key: tuple(np.shape(tensors[key])) for key in tensors if key not in dropped}
    keys = [(entry, _keys_to_read(entry, tensors)) for entry in parameters(entries)]
    read = {key for _, group in keys for key in group}
    wanted = {key: shape for key, shape in known.items() if key in read or key in found}
    _check(found, wanted, f"{source} does not fit the model")
    return keys


def build_entries(
    rules: Iterable[Rule],
    sizes: Mapping[str, int],
    count: int,
    path_prefix: str = "",
    key_prefix: str = "",
    *,
    start: int = 0,
    step: int = 1,
) -> list[Entry]:
    """Fills rules with sizes.

    Args:
        rules: (path of ours, torch key, layout). A `{}` in the torch key numbers the slices of our
            leading axis (layers of a scanned stack, decoders of an alignment branch).
        sizes: size of each axis named in the layouts; `D'` has the size of `D`.
        count: length of the leading axis of numbered rules.
        path_prefix: put before every path of ours.
        key_prefix: put before every torch key.
        start: number of the first slice of numbered rules (a stack that begins further down).
        step: from the number of a slice to the next one's (a stack of every second layer).

    Returns:
        One entry a rule, in the same order.
    """
    entries = []
    for path, key, layout in rules:
        shape, permutation, torch_shape = _read_layout(layout, sizes)
        stacked = "{}" in key
        numbers = range(start, start + count * step, step)
        keys = tuple(key.format(index) for index in numbers) if stacked else (key,)
        entries.append(
            Entry(
                path=path_prefix + path,
                torch_keys=tuple(key_prefix + key for key in keys),
                stacked=stacked,
                shape=(count, *shape) if stacked else shape,
                permutation=permutation,
                torch_shape=torch_shape,
            )
        )
    return entries


def parameters(entries: Iterable[Entry]) -> list[Entry]:
    """The entries that stand for a parameter of ours, without constants."""
    return [entry for entry in entries if entry.constant is None]


def with_copies(entries: Iterable[Entry], copies: Mapping[str, Sequence[str]]) -> list[Entry]:
    """Says which torch keys hold a tensor again.

    Args:
        entries: entries of a model.
        copies: `{path of ours: torch keys}`; prefixes and all.

    Returns:
        The entries, in the same order.
    """
    return [
        dataclasses.replace(entry, copies=tuple(copies.get(entry.path, entry.copies)))
        for entry in entries
    ]


def constant_entry(key: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> Entry:
    """The entry of a buffer of the original that is no parameter, such as `position_ids`.

    Args:
        key: its torch key.
        shape: its shape.
        make: makes its value for export.
    """
    permutation = tuple(range(len(shape)))
    return Entry("", (key,), False, shape, permutation, shape, constant=make)


def _keys_to_read(entry: Entry, tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that a parameter is read from: its own, or a copy where that is all there is."""
    if entry.copies and entry.torch_keys[0] not in tensors:
        return next(((key,) for key in entry.copies if key in tensors), entry.torch_keys)
    return entry.torch_keys


def check_copies(entry: Entry, read: str, tensors: Mapping[str, Any], source: str) -> None:
    """Raises if a file's copies of a tied tensor differ."""
    for key in entry.all_keys if entry.copies else ():
        if key == read or key not in tensors:
            continue
        first, second = tensors[read], tensors[key]
        if isinstance(first, jax.ShapeDtypeStruct):
            continue
        if not np.array_equal(np.asarray(first), np.asarray(second)):
            raise CheckpointError(
                f"{source} does not fit the model: {read} and {key} are one tied tensor in it, "
                "but differ in the file"
            )


class _Lazy(Sequence):
    """The tensors of some keys, fetched only when asked for."""

    def __init__(self, tensors: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        self._tensors = tensors
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Any:
        return self._tensors[self._keys[index]]


def _read_layout(
    layout: str, sizes: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Reads `D s h d -> (s h d) D` into our shape, the permutation and the torch shape."""

    def size(axis: str) -> int:
        if axis.isdigit():
            return int(axis)
        return sizes[axis.rstrip("'")]  # a prime tells two axes of one size apart

    ours, arrow, torch = layout.partition("->")
    if not arrow:
        shape = tuple(size(axis) for axis in ours.split())
        return shape, tuple(range(len(shape))), shape
    axes = ours.split()
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", torch)]
    # A 1 that only the torch side has is an axis that reshaping adds.
    permutation = tuple(
        axes.index(axis) for group in groups for axis in group if axis != "1" or "1" in axes
    )
    shape = tuple(size(axis) for axis in axes)
    return shape, permutation, tuple(int(np.prod([size(a) for a in group])) for group in groups)


def _ignored(keys: Sequence[str], ignore: Mapping[str, str], source: str) -> set[str]:
    """Gives the keys that a pattern leaves out, and logs how many and why."""
    dropped: set[str] = set()
    for pattern, reason in ignore.items():
        hits = {key for key in keys if re.fullmatch(pattern, key)} - dropped
        if hits:
            logger.info("%s: left out %d keys like %r: %s", source, len(hits), pattern, reason)
        dropped |= hits
    return dropped


def _check(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raises one error that lists every missing, unexpected and mis-shaped name."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    misshaped = [name for name in wanted if name in found and found[name] != wanted[name]]
    if not (missing or unexpected or misshaped):
        return
    lines = [f"{what}:"]
    lines += _listed("missing", missing, lambda name: _near(name, unexpected))
    lines += _listed("unexpected", unexpected, lambda name: _near(name, missing))
    lines += _listed("mis-shaped", misshaped, lambda n: _shape_hint(found[n], wanted[n]))
    if len(misshaped) > len(wanted) // 2:
        lines.append("  most shapes differ: this is a model of another size than the config says.")
    raise MisfitError("\n".join(lines))


def _listed(kind: str, names: Sequence[str], hint: Callable[[str], str]) -> list[str]:
    """Lines of the error for one kind of misfit."""
    if not names:
        return []
    lines = [f"  {len(names)} {kind}:"]
    lines += [f"    {name}{hint(name)}" for name in names[:_LISTED]]
    return lines + ([f"    ... and {len(names) - _LISTED} more"] if len(names) > _LISTED else [])


def _near(name: str, others: Sequence[str]) -> str:
    """Hint naming the nearest of the names that are left over on the other side."""
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
    return f" (nearest: {close[0]})" if close else ""


def _shape_hint(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Hint saying both shapes, and whether one is the other reversed."""
    hint = f" is {found}, the model wants {wanted}"
    return hint + ("; it looks transposed" if found == wanted[::-1] else "")
