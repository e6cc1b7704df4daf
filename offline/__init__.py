"""The offline converter: a Hugging Face model folder becomes a MiLo checkpoint, one layer in memory at a time.

What happens to a model on its way (:mod:`.convert` is the flow, :mod:`.cli` the command that starts it):

1. :mod:`.source` reads config.json and the tensors' headers, finds the family (:mod:`.families`, a table of data), and
   plans the layers.
2. :mod:`.calibration` lets a text go through the model a layer at a time, and gathers what errors of a matrix cost.
3. :mod:`.ranks` gives every matrix the rank of its compensator, by policies or within a byte budget.
4. :mod:`.batches` puts matrices of one shape together; :mod:`.spread` reads them when their turn comes, and deals them
   to the devices.
5. :mod:`.solve` turns a batch into codes, scales, zero points and factors.
6. :mod:`.learn` trains all of these on the layer's output, where there is a text.
7. :mod:`.checkpoint` writes them, and publishes the folder whole or not at all.
8. :mod:`.evaluation` measures and verifies what was written.

:mod:`.nouns` holds what all of these speak of."""
