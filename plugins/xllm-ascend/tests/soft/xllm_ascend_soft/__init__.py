"""A soft NPU: the real torch_npu over a runtime of our own that keeps "device" memory on the host. For tests of xllm-ascend; never shipped."""
