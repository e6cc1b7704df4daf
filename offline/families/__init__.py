"""Model families as data: which matrices a layer of each has, what stays as it is, and how transformers names them."""
