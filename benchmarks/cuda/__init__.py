"""Proof and figures on a real NVIDIA GPU; see `__main__`."""
