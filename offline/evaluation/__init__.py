"""Evaluation: what a source model or a checkpoint makes of a text."""
