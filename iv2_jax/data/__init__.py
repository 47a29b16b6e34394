"""Decoding, sampling, augmentation and Grain pipelines; never imports JAX."""
