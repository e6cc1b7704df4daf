"""Times of single layers on a GPU, ours and other kernels', and the search for tiles."""
