"""Flax Linen modules and their frozen-dataclass configs: no I/O, no meshes, no losses."""
