"""The offline converter: a Hugging Face model folder becomes a MiLo checkpoint, without calibration data."""
