"""Importing this imports the real torch_npu over the stub libraries. Its host code runs and launches kernels by name; nothing computes."""

from __future__ import annotations

import ctypes
import os

from xllm_ascend_soft.build import OPERATORS, RUNTIME, build

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
os.environ["TASK_QUEUE_ENABLE"] = (
    "0"  # torch_npu copies on a thread of its own otherwise, and numbers here are made at once
)
FOLDER = build()
# Known to the loader under their names from here on; children find them by the path.
for _name in (RUNTIME, *sorted(path.name for path in FOLDER.glob("*.so") if path.name != RUNTIME)):
    ctypes.CDLL(str(FOLDER / _name), ctypes.RTLD_GLOBAL)
os.environ["LD_LIBRARY_PATH"] = str(FOLDER)

import torch  # noqa: E402  the libraries come first
import torch_npu  # noqa: E402, F401

torch.npu.set_compile_mode(jit_compile=False)
torch.npu.init()
_operators = ctypes.CDLL(OPERATORS)
_operators.soft_launched.restype = ctypes.c_char_p


def launched() -> list[str]:
    """Names of the kernels that torch_npu launched since the last call, in order."""
    torch.npu.synchronize()
    names = _operators.soft_launched().decode().split()
    _operators.soft_forget()
    return names
