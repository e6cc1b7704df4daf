"""Solving a matrix: base quantizers, compensators, and the loops that fit the one to the other."""
