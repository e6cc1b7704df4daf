"""What compensators cost a checkpoint when it is served: bytes that a token reads, launches, and a prediction."""
