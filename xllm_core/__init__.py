"""xLLM for Python."""
