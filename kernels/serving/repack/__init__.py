"""From the checkpoint layout to the kernel layout on the device: one launch for each kind of tensor of a layer.

:mod:`..layout` says what the layouts are and does the same in torch, matrix by matrix, which is what CPUs use and what
the tests compare with, to the bit. Here ``base`` brings over codes, scales and zero points of all experts, ``factors``
U and V of all of them whatever their ranks, and ``norms`` bounds their outputs (up to rounding: its sums have another
order); ``tables`` is what they are told of rows and ranks, and ``layer`` launches them. Nothing is unpacked in memory:
beside source and result there are only tables.
"""
