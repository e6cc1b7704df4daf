"""Decoding in vLLM, and vLLM's server."""
