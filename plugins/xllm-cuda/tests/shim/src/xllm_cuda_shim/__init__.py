"""A device of kind "cuda" on CPU tensors, for tests of xllm-cuda with interpreted kernels. Never shipped."""
