"""Attention kernels: one file a backend, and `choice.py`, which picks one."""
