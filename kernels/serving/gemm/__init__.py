"""The GEMM on 3-bit weights."""
