"""The command line ``milo``."""

from .command import main

__all__ = ["main"]
