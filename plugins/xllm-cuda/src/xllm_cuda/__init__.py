"""NVIDIA GPUs for xLLM. Importing this loads nothing."""
