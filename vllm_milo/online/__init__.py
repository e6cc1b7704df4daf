"""Quantizing a 16-bit model while vLLM loads it: ``vllm serve MODEL --quantization milo``."""
