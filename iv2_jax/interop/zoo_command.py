"""`iv2 zoo`: every named model with its size, its inputs and what it can load."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("name", nargs="?", help="a model: prints its parameters one by one")
    parser.add_argument("--kind", help="list only models of this kind, such as student")
    parser.add_argument("--tests", action="store_true", help="list the tiny test models too")
    parser.epilog = """\
examples:
  iv2 zoo
  iv2 zoo --kind student
  iv2 zoo internvideo2_1b_pretrain

Nothing is allocated: shapes alone are worked out.
"""


def run(args: argparse.Namespace) -> int:
    """Prints the table, or one model's parameters; returns 0."""
    print(overview(args.name) if args.name else table(args.kind, tests=args.tests))
    return 0


def table(kind: str | None = None, *, tests: bool = False) -> str:
    """All models, a line each, by kind.

    Args:
        kind: only those of this kind.
        tests: the tiny test models too.

    Raises:
        ConfigError: there is no such kind.
    """
    from iv2_jax.interop import families
    from iv2_jax.models import zoo

    if kind is not None:
        families.get(kind)
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for name in zoo.names():
        if name.startswith("test_") and not tests:
            continue
        config = zoo.get(name)
        family = families.of(config)
        if kind in (None, family.name):
            row = (name, f"{_count(family.entries(config)):,}", _inputs(family, config))
            groups.setdefault(family.name, []).append(row)
    width = max(len(row[0]) for rows in groups.values() for row in rows)
    lines = []
    for family_name, rows in groups.items():
        family = families.get(family_name)
        lines += ["", f"{family_name}: {family.kind.what}", f"  loads {family.loads}"]
        lines += [f"  {name:<{width}}  {count:>14}  {shape}" for name, count, shape in rows]
    return "\n".join([f"  {'model':<{width}}  {'parameters':>14}  input, a batch of one", *lines])


def overview(name: str) -> str:
    """The parameters of one model, and what of a file is mapped and left out.

    Raises:
        ConfigError: no model has the name.
    """
    from clu import parameter_overview

    from iv2_jax.interop import entries, families
    from iv2_jax.models import zoo

    config = zoo.get(name)
    family = families.of(config)
    params = parameter_overview.get_parameter_overview(
        zoo.abstract_params(config), include_stats=False
    )
    keys = len(entries.torch_shapes(family.entries(config)))
    lines = [
        f"{name}: {family.kind.what}",
        f"input {_inputs(family, config)}",
        params,
        f"loads {family.loads}: {keys} tensors, all of which must be there",
    ]
    lines += [
        f"  left out, if there: {pattern}  {why}" for pattern, why in family.ignorable().items()
    ]
    exported = "never" if family.torch_file is None else "as torch, safetensors or hf"
    return "\n".join([*lines, f"exported {exported}"])


def _count(table_of_keys: list) -> int:
    """Number of parameters, by the table of keys: no network is built."""
    import math

    from iv2_jax.interop import entries

    return sum(math.prod(entry.shape) for entry in entries.parameters(table_of_keys))


def _inputs(family: object, config: object) -> str:
    """The shapes of a model's inputs, such as `video 1x8x224x224x3`."""
    shapes = family.kind.inputs(config).items()
    return ", ".join(
        f"{name} {'x'.join(map(str, value.shape))}"
        for name, value in shapes
        if hasattr(value, "shape")
    )
