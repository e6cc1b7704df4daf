"""Models of the Hugging Face Hub: read from it, whole or by their headers, and put there."""
