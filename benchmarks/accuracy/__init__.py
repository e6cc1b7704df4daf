"""Perplexity and output errors of quantized models against their stored bits."""
