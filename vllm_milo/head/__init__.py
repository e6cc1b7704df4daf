"""The output head in 8 or 4 bits: how checkpoints store it, and what serves it."""
