"""The offline converter: a Hugging Face model folder becomes a MiLo checkpoint, one layer in memory at a time.

What happens to a model on its way (:mod:`.convert` is the flow, :mod:`.cli` the command that starts it):

1. :mod:`.source` reads config.json and the tensors' headers, finds the family, and plans the layers.
2. :mod:`.calibration` says what errors of each matrix cost, from a text, from what the model writes, or from nothing.
3. :mod:`.ranks` gives every matrix the rank of its compensator, by policies or within a byte budget.
4. :mod:`.batches` loads a layer and puts its matrices of one shape together.
5. :mod:`.solve` turns a batch into codes, scales, zero points and factors.
6. :mod:`.checkpoint` writes them, and publishes the folder whole or not at all.
7. :mod:`.evaluation` measures what was written.

:mod:`.nouns` holds what all of these speak of. Two residents are to come: learned codes, a stage between 5 and 6
(``solve/learned``), and the families as a table of data (``source/families``).
"""
