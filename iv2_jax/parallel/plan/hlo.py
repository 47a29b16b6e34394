"""Reads the text of a compiled XLA program: computations, instructions, shapes, groups.

Only what adding up needs is read. The grammar is that of `Compiled.as_text()`; what differs between
the CPU's and the TPU's compiler (tiled layouts, replica groups as meshes) is read in both forms.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_DTYPE_BITS = {
    "pred": 8, "token": 0, "opaque": 0, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8,
    "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f4e2m1fn": 4, "bf16": 16,
    "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_MESH_GROUPS = re.compile(
    r"mesh\[([^\]]*)\](?:, ?device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?|[\d,]+)\))? \{([^}]*)\}"
)
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclass(frozen=True)
class Shape:
    """An array in a program.

    Attributes:
      dtype: HLO's name of the element type.
      dims: Sizes.
      on_chip: Whether it lives in on-chip memory (memory space 1 of a TPU) instead of HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without the padding of tiles."""
        bits = _DTYPE_BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 32)
        return -(-self.size * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: Name within its computation.
      opcode: Such as `dot`, `fusion`, `all-gather-start`.
      shapes: Arrays of the result; several for a tuple.
      operands: Names of what it takes.
      attributes: The rest of the line.
      is_root: Whether it is its computation's result.
      literal: What stands between the parentheses of a constant or parameter, else "".
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    literal: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations by the role they are called in; branches are numbered."""
        found = dict(_CALLED.findall(self.attributes))
        for names in _CALLED_LISTS.findall(self.attributes):
            listed = [name.strip().lstrip("%") for name in names.split(",")]
            found |= {f"branch{i}": name for i, name in enumerate(listed)}
        return found

    def field(self, name: str) -> str:
        """The value of `name=...` up to the next comma or space, or ""."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found.group(1) if found else ""


@dataclass
class Program:
    """A compiled program.

    Attributes:
      entry: Name of the computation that runs.
      computations: Name -> instruction name -> instruction.
    """

    entry: str
    computations: dict[str, dict[str, Instruction]]


def parse(text: str) -> Program:
    """Reads `Compiled.as_text()`.

    Raises:
      ValueError: There is no entry computation in it.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            found = _COMPUTATION.match(line)
            if found and not line.startswith("HloModule"):
                current = computations.setdefault(found.group(2), {})
                entry = found.group(2) if found.group(1) else entry
            continue
        if found := _INSTRUCTION.match(line):
            instruction = _instruction(line[found.end() :], found.group(2), bool(found.group(1)))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation in the text of the program")
    return Program(entry, computations)


def _instruction(rest: str, name: str, is_root: bool) -> Instruction:
    """Reads what stands behind `name = `: shape, opcode, operands, attributes."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    opcode, inside = rest[:opening], rest[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=tuple(_shapes(shapes)),
        operands=tuple(_NAME.findall(inside)),
        attributes=rest[closing + 1 :],
        is_root=is_root,
        literal=inside if opcode in ("constant", "parameter") else "",
    )


def _closing(text: str, opening: int) -> int:
    """Position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"no closing parenthesis in {text[opening : opening + 80]!r}")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(re.sub(r"/\*.*?\*/", "", text)):
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        yield Shape(dtype, sizes, "S(1)" in layout)


@dataclass(frozen=True)
class Window:
    """One spatial dimension of a convolution."""

    size: int = 1
    stride: int = 1
    pad_low: int = 0
    pad_high: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1
    reversal: bool = False

    def pairs(self, inputs: int, outputs: int) -> int:
        """Pairs of an output and a kernel position that meet a real input, not padding or holes.

        The compiler writes batched matrix products as convolutions whose windows are mostly holes,
        so that the window's size alone would count too much.
        """
        out = np.arange(outputs)[:, None] * self.stride - self.pad_low
        at = out + np.arange(self.size)[None] * self.rhs_dilate
        real = (at >= 0) & (at % self.lhs_dilate == 0) & (at // self.lhs_dilate < inputs)
        return int(np.count_nonzero(real))


def windows(instruction: Instruction, spatial: int) -> list[Window]:
    """The windows of a convolution's spatial dimensions, in order."""
    found = re.search(r"\bwindow=\{([^}]*)\}", instruction.attributes)
    given = [{} for _ in range(spatial)]
    for item in found.group(1).split() if found else ():
        name, _, values = item.partition("=")
        for target, value in zip(given, values.split("x"), strict=True):
            if name == "pad":
                low, _, high = value.partition("_")
                target |= {"pad_low": int(low), "pad_high": int(high)}
            else:
                target["reversal" if name == "rhs_reversal" else name] = int(value)
    names = {f.name for f in dataclasses.fields(Window)}
    return [Window(**{k: v for k, v in values.items() if k in names}) for values in given]


def replica_groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Groups of partitions that a collective joins; one group of all when none are named.

    Three forms are read: `{{0,1},{2,3}}`, `[2,2]<=[4]` with an optional transposition `T(1,0)`, and
    `mesh['a'=2,'b'=2] {'b'}`.

    Raises:
      ValueError: The groups are written in another form.
    """
    text = instruction.attributes
    if found := re.search(r"source_target_pairs=\{((?:\{[\d,]+\},?)*)\}", text):
        return _listed(found.group(1))
    found = re.search(r"replica_groups=(.*)", text)
    if not found or found.group(1).startswith("{}"):
        return [list(range(devices))]
    text = found.group(1)
    if found := re.match(r"\{((?:\{[\d,]+\},?)+)\}", text):
        return _listed(found.group(1))
    if found := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = (_ints(g) if g else None for g in found.groups())
        ids = np.arange(math.prod(source)).reshape(source)
        ids = ids.transpose(order) if order else ids
        return ids.reshape(shape[0], -1).tolist()
    if found := _MESH_GROUPS.match(text):
        return _of_mesh(*found.groups())
    raise ValueError(f"replica groups of {instruction.name} in an unknown form: {text[:120]}")


def _of_mesh(axes: str, ids: str | None, joined: str) -> list[list[int]]:
    """Groups along the axes `joined` of a mesh written out; an axis may be split `'a':(2)4`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    dims, group = [], []
    parts = {
        name: (int(before), int(size))
        for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", joined)
    }
    whole = set(re.findall(r"'([^']+)'(?!:)", joined))
    for name, size in sizes.items():
        if name in parts:
            before, part = parts[name]
            dims += [before, part, size // before // part]
            group.append(len(dims) - 2)
        else:
            dims.append(size)
            group += [len(dims) - 1] if name in whole else []
    order = np.arange(math.prod(dims))
    if ids:
        source = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids.strip())
        if source is None:
            order = np.asarray(_ints(ids))
        else:
            order = order.reshape(_ints(source.group(1)))
            order = order.transpose(_ints(source.group(2))) if source.group(2) else order
    grid = order.reshape(dims)
    rest = [i for i in range(len(dims)) if i not in group]
    count = math.prod(dims[i] for i in group)
    return grid.transpose(rest + group).reshape(-1, count).tolist()


def _listed(text: str) -> list[list[int]]:
    return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", text)]


def _ints(text: str) -> list[int]:
    return [int(value) for value in text.split(",") if value.strip()]


def trip_count(program: Program, loop: Instruction) -> int | None:
    """Turns of a `while`: as the compiler knows it, else until a counter reaches a constant.

    A scan and a fori_loop become `while i < n`, from 0 by 1 or, where the compiler has unrolled
    the body, by more. Where there are further conditions, data may end the loop earlier: this is
    the most it takes.

    Returns:
      None when neither tells.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(found.group(1))
    body = program.computations[loop.called["body"]]
    turns = [
        -(-limit // _step(body, counter))
        for counter, limit in _limits(program, loop.called["condition"], ())
    ]
    return min(turns, default=None)


def _step(body: dict[str, Instruction], counter: int) -> int:
    """What a turn adds to a number of the carry; 1 where that is not to be seen."""
    root = next(i for i in body.values() if i.is_root)
    if root.opcode != "tuple" or counter >= len(root.operands):
        return 1
    new = body.get(root.operands[counter])
    while new is not None and new.opcode in ("copy", "bitcast"):
        new = body.get(new.operands[0])
    if new is None or new.opcode != "add":
        return 1
    added = [body[name] for name in new.operands if name in body]
    return next((int(i.literal) for i in added if i.opcode == "constant"), 1)


def _limits(
    program: Program, name: str, given: Sequence[Instruction | None]
) -> Iterator[tuple[int, int]]:
    """Which numbers of the carry a condition wants below which constants.

    Args:
      program: All computations.
      name: Of the computation.
      given: What its parameters are, if it is called by another.
    """
    scope = program.computations[name]

    def source(operand: str) -> Instruction | None:
        """What makes an operand, behind copies and the caller's arguments."""
        found = scope.get(operand)
        while found is not None and found.opcode in ("copy", "bitcast"):
            found = scope.get(found.operands[0])
        if found is not None and found.opcode == "parameter" and given:
            return given[int(found.literal)]
        return found

    for instruction in scope.values():
        operands = [source(operand) for operand in instruction.operands]
        if instruction.opcode == "compare":
            operands = operands[:: -1 if "direction=GT" in instruction.attributes else 1]
            below, limit = operands
            if (
                re.search("direction=[LG]T", instruction.attributes)
                and below is not None
                and below.opcode == "get-tuple-element"
                and limit is not None
                and limit.opcode == "constant"
            ):
                yield int(below.field("index")), int(limit.literal)
        if instruction.opcode in ("fusion", "call"):
            for called in instruction.called.values():
                yield from _limits(program, called, operands)
