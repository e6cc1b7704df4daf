"""Source models with fewer than 16 bits a weight: what config.json says of it, which tensors a matrix is, its values.

:mod:`.table` is the table of formats, :mod:`.settings` reads config.json by it, :mod:`.plain` shows the headers of such
a model as those of a model in 16 bits, and :mod:`.encoding` makes the values of a matrix.
"""
