"""Kernels are compiled beside other work: in threads of this process, or in others that leave Python's lock alone.

:mod:`.threads` compiles each distinct launch once. :mod:`.jobs` is a launch as it goes to another process.
:mod:`.helpers` are processes that compile for those threads, of which :mod:`.process` is the other end.
"""
