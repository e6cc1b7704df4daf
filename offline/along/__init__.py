"""Conversion along a calibration text."""
