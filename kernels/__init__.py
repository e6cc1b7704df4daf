"""Arithmetic of MiLo: the operators, what they compute, and the Triton kernels that compute it.

What every backend shares stands here:

- :mod:`.ops`: the operators ``milo::linear`` and ``milo::fused_moe``, and the choice of a backend.
- :mod:`.weights`: the tensors of a layer in the checkpoint layout. :mod:`.packing`: its 3-bit codes.
- :mod:`.reference`: the operators in plain torch. :mod:`.bounds`: how large an expert's outputs can get.

For Triton there are three rooms, and what they need:

- :mod:`.serving`: the kernels that serve a layer.
- :mod:`.convert`: the kernels that the converter uses on GPUs.
- :mod:`.tuning`: searches tiles for a shape on a device.
- :mod:`.launch`: how kernels are launched, or noted. :mod:`.warm_up`: has noted kernels compiled when a layer is
  loaded, by :mod:`.compiling`.
- :mod:`.tuned`: files of tiles, and which one counts for a layer.

The package imports only torch, and triton where it is used.
"""
