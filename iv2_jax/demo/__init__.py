"""The demo: real clips and real weights from packages anyone can install."""
