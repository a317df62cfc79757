"""Triton kernels: device code only. What launches them stands one folder up.

All of them compute in float32 and round once, when they store.
"""
