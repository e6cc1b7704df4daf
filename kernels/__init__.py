"""Arithmetic of MiLo: packing of 3-bit codes, reference paths, Triton GEMMs and the operators that join them.

Imports only torch, and triton lazily.
"""
