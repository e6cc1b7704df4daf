"""Searches tiles for routed experts of a shape on a GPU; :mod:`..tuned` keeps what is found. Needs a GPU and Triton.

- :mod:`.tune`: the search over token counts in a given time; what is chosen of it.
- :mod:`.candidates`: which tiles are worth a try, by a model of their cost.
- :mod:`.search`: the search at one token count, over whatever takes the time of a pair of tiles.
- :mod:`.layer`: random experts of a shape, which are checked and timed. :mod:`.random_weights`: their tensors.
- :mod:`.compiling`: compiles many candidates at a time. :mod:`.timing`: times in CUDA graphs, within a budget.
"""
