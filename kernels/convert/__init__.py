"""Triton kernels of the converter. Imported only where Triton is used."""
