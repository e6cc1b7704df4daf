"""What vLLM's dummy weights need to be measured with: codes that are no zeros, and routes that are alike for all."""
