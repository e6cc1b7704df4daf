"""Times of the converter."""
