"""Calibration: what errors of a matrix cost, from a text, from what the model writes, or from nothing."""
