"""MiLo checkpoints in transformers: what ``from_pretrained`` finds once vllm_milo is imported."""
