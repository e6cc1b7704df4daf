"""MiLo checkpoints without compensators become checkpoints of other tools with the same weights."""
