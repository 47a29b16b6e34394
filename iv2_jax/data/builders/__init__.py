"""Packed data sets: bytes of short clips in ArrayRecord, readable by TFDS."""
