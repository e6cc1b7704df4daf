"""Solving a model's batches while the next are read, on one device or dealt to several.

:mod:`.job` is a batch with all that solving it takes, its weights or where they are to be read (:mod:`.load`), and
what comes of it. :mod:`.ahead` makes the next one while this one is solved. :mod:`.devices` solves jobs in their order,
which :mod:`.deal` deals where there are several: on its first device in this process, on each further one in a process
of its own (:mod:`.remote` is this end of it, :mod:`.process` the other, :mod:`.pipe` what lies between), which reads
the weights of its jobs and sends results packed as they will be stored.

Why processes and not threads: the precision of float32 products (:mod:`..solve.precision`) is one setting of the whole
process, which the solver changes many times a round, so threads would change each other's results; and a round launches
thousands of small kernels, for which threads would wait for each other.
"""
