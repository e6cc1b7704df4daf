"""Checkpoints that other tools have quantized to 3 bits become MiLo checkpoints with the same weights."""
