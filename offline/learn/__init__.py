"""Learned codes: after the solver, codes, scales, zero points and factors of a layer are trained on its output."""
