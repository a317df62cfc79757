"""Commands of `xllm`, one file each; imported only when they run."""
