"""Kernels compiled ahead of time, without a GPU: what they need of the chip, and how long they must take at least.

python -m xllm_cuda.aot --write DIR      compiles everything and writes aot.json and AOT.md
"""
