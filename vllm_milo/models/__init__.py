"""What vLLM's models do that their layers alone do not tell: names, shapes and loading that differ by family."""
