"""torch's own operators that we and the core's sampler ask for: torch_npu has a kernel of CANN for each, and sends none of them to the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# In a process of its own, where nothing has taken the place of torch_npu's host code.
CODE = """
import json, sys; sys.path[:] = json.loads(sys.argv[1])
from xllm_ascend_soft.libraries import launched
import torch
from xllm_ascend.device import NpuDevice
from xllm_ascend.plain import BlockCopy, Embedding, Linear
from xllm_core.plugins import gumbel
device = NpuDevice(0)
make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="npu")
whole = lambda *shape: make(*shape, dtype=torch.int64)
scores, linear = make(4, 90, dtype=torch.float32), Linear(device)
calls = {
    "linear": lambda: linear(make(7, 64), linear.prepare(make(48, 64), None)),
    "linear with bias": lambda: linear(make(7, 64), linear.prepare(make(48, 64), make(48))),
    "embedding": lambda: Embedding(device)(whole(7), make(50, 64)),
    "block_copy": lambda: BlockCopy(device)((make(3, 128, 2, 64),), whole(2), whole(2)),
    "greedy": lambda: scores.argmax(dim=-1),
    "sort": lambda: scores.sort(dim=-1, descending=True),
    "top-k": lambda: scores.topk(8, dim=-1),
    "softmax": lambda: scores.softmax(dim=-1),
    "sums": lambda: scores.cumsum(dim=-1),
    "gather": lambda: scores.gather(-1, whole(4, 1)),
    "mask": lambda: scores.masked_fill(scores < 0, 1.0),
    "noise": lambda: gumbel(whole(4, 1), whole(90)),
}
names = {}
for name, call in calls.items():
    call()
    launched()
    call()
    names[name] = launched()
print(json.dumps(names))
"""
WANTED = {
    "linear": ["aclnnMatmul"], "linear with bias": ["aclnnAddmm"], "embedding": ["aclnnIndexSelect"],
    "block_copy": ["aclnnIndexSelect", "aclnnInplaceIndexCopy"], "greedy": ["aclnnArgMax"], "sort": ["aclnnSort"], "top-k": ["aclnnTopkV2"],
    "softmax": ["aclnnSoftmax"], "sums": ["aclnnCumsum"], "gather": ["aclnnGather"],
}  # fmt: skip


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    """Kernels by call."""
    command = [sys.executable, "-c", CODE, json.dumps(sys.path)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0 and "fall back" not in done.stderr, done.stderr
    answer: Any = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("call", list(WANTED))
def test_one_kernel_each(call: str, names: dict[str, list[str]]) -> None:
    """Killed by: an operator that torch_npu takes apart, or computes on the host."""
    assert names[call] == WANTED[call]


def test_noise_stays_on_the_device(names: dict[str, list[str]]) -> None:
    """Its whole numbers of 64 bits are mixed by kernels of CANN. Killed by: a step that torch_npu computes on the host, step by step."""
    assert {"aclnnMuls", "aclnnRightShift", "aclnnBitwiseXorTensor", "aclnnLog1p", "aclnnLog"} <= set(names["noise"])
