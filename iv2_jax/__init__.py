"""InternVideo2 in JAX: train, evaluate and convert video foundation models."""

__version__ = "0.1.0"
