"""Base quantizers: codes, scales and zero points of groups of weights."""
