"""Checkpoints: writing them, and looking at what they hold."""
