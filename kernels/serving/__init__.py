"""Triton GEMMs on 3-bit weights with compensators. Imported only where Triton is used."""
