"""Native CPU kernels for xLLM."""
