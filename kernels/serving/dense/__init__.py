"""Dense layers: by tiles of 3 bits, or in 16 bits for a call or for good."""
