"""Bytes that an instruction of a compiled program moves to and from HBM; on-chip buffers are free.

A fusion counts as one instruction: what it is given as far as it reads it, and its result as far
as it writes it. Slices count as slices, however deep the fusion that takes them.
"""

from __future__ import annotations

from iv2_jax.parallel.plan.hlo import Instruction, Program

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# They move nothing themselves: names, views, and what is counted elsewhere.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "async-start",
    "async-update", "async-done", "domain",
}  # fmt: skip
# A buffer of a loop whose slices are written turn by turn.
_ALLOCATES = 'custom_call_target="AllocateBuffer"'
# They read as much as they give, not all that they are given.
_SLICING = {"dynamic-slice", "slice", "gather"}


def moved(instruction: Instruction, scope: dict[str, Instruction], program: Program) -> float:
    """Bytes that an instruction reads from and writes to HBM.

    Args:
      instruction: One that is not inside a fusion.
      scope: The computation that it stands in.
      program: What fusions call.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done") or _ALLOCATES in instruction.attributes:
        return 0
    if opcode == "fusion":
        return _moved_by_fusion(instruction, scope, program)
    if opcode in ("send", "recv"):
        return instruction.shapes[0].bytes
    if opcode in _SLICING:
        return 2 * _in_hbm(instruction)
    operands = [scope[name] for name in instruction.operands if name in scope]
    if opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1])
    if opcode == "scatter":
        return 2 * _in_hbm(operands[-1])
    read = sum(map(_in_hbm, operands))
    if opcode.endswith("-start"):
        # The result repeats the operands, and carries the arrays that are filled later.
        arrays = instruction.shapes[:2] if opcode == "copy-start" else instruction.shapes
        result = sum(shape.bytes for shape in arrays if not shape.on_chip)
        return max(result, read)
    return read + _in_hbm(instruction)


def _moved_by_fusion(fusion: Instruction, scope: dict[str, Instruction], program: Program) -> float:
    """Operands as far as they are read, and the result as far as it is written."""
    inner = program.computations[fusion.called["calls"]]
    users = _users(inner)
    total = 0.0
    carried = carries_on(fusion)
    for instruction in inner.values():
        if instruction.opcode == "parameter":
            index = int(instruction.literal)
            operand = scope.get(fusion.operands[index])
            using = users.get(instruction.name, ())
            if carried and all(user.opcode in COLLECTIVES for user in using):
                continue
            if operand is not None and _in_hbm(operand):
                total += _read(instruction, users, program)
    root = next(i for i in inner.values() if i.is_root)
    parts = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for part, shape in zip(parts, fusion.shapes, strict=False):
        if shape.on_chip:
            continue
        source = _behind_views(part, inner)
        if carried and source.opcode in (*COLLECTIVES, "parameter"):
            continue
        updates = source.opcode == "dynamic-update-slice"
        total += inner[source.operands[1]].bytes if updates else shape.bytes
    return total


def _read(parameter: Instruction, users: dict[str, list[Instruction]], program: Program) -> float:
    """Bytes of a fusion's parameter that are read: slices only, where only slices are taken.

    A fusion inside the fusion may be what takes them.
    """
    total, pending = 0.0, list(users.get(parameter.name, ()))
    names = {parameter.name}
    while pending:
        user = pending.pop()
        if user.opcode == "bitcast":
            names.add(user.name)
            pending += users.get(user.name, ())
        elif user.opcode in _SLICING and user.operands[0] in names:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] in names:
            continue  # written in place
        elif user.opcode == "fusion":
            inner = program.computations[user.called["calls"]]
            inner_users = _users(inner)
            total += sum(
                _read(i, inner_users, program)
                for i in inner.values()
                if i.opcode == "parameter" and user.operands[int(i.literal)] in names
            )
        else:
            return parameter.bytes
    return min(total, parameter.bytes)


def _users(computation: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    """Name -> the instructions that it is an operand of."""
    users: dict[str, list[Instruction]] = {}
    for instruction in computation.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    return users


def carries_on(fusion: Instruction) -> bool:
    """Whether a fusion only carries on or ends a collective that another one has begun.

    The TPU's compiler spreads a collective over the computations beside it: it is printed in the
    fusion that starts it, in each that it runs along with, and in the one that ends it.
    """
    ends = fusion.name.startswith("async-collective-done")
    return ends or fusion.called["calls"].startswith("async_collective_fusion")


def _behind_views(instruction: Instruction, scope: dict[str, Instruction]) -> Instruction:
    """What an instruction is a view of."""
    while instruction.opcode in ("bitcast", "copy") and instruction.operands:
        instruction = scope[instruction.operands[0]]
    return instruction


def _in_hbm(instruction: Instruction) -> float:
    """Bytes of a result that are not on the chip."""
    return sum(shape.bytes for shape in instruction.shapes if not shape.on_chip)
