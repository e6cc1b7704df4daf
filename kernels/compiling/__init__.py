"""Kernels are compiled beside other work: in other processes, which leave Python's lock alone.

:mod:`.threads` brings each distinct launch in once. :mod:`.jobs` is a launch as it goes to another process.
:mod:`.helpers` are processes that compile for those threads, of which :mod:`.process` is the other end. :mod:`.known`
tells what needs no process, since it was compiled before, and :mod:`.underway` makes the first step wait for all of it.
"""
