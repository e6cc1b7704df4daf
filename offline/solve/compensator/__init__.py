"""Compensators: low-rank factors of what the base leaves, and their storage."""
