"""Tests of `iv2_jax.data`."""
