"""What quantizing at load costs a model's predictions: MiLo beside vLLM's own rounding to nearest."""
