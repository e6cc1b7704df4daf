"""The compensators' down-projection V·x, which comes before the GEMM.

:mod:`.plan` spreads it over programs, :mod:`.launcher` launches :mod:`.kernel` with what :mod:`.arguments` describes.
"""
