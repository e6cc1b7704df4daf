"""Reading source models: folders and shards, the families' names, the plan of layers, tokens, and the whole model."""
