"""Every instruction set that this processor runs is tested, not only the best."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from xllm_cpu.device import CpuDevice
from xllm_cpu.isa import NEEDS, runnable, why_not


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which paths were run, and why not the others: a suite that is green says nothing about those."""
    terminalreporter.write_line(f"instruction sets tested: {', '.join(runnable()) or 'none'}")
    for isa in NEEDS:
        if reason := why_not(isa):
            terminalreporter.write_line(f"not tested: {isa}: {reason}")


@pytest.fixture(params=runnable() or ["none"])
def device(request: pytest.FixtureRequest) -> Iterator[CpuDevice]:
    """The processor by one instruction set. There is a compiler where these tests run, so there is at least one."""
    before = torch.get_num_threads()
    device = CpuDevice(0, isa=request.param)
    yield device
    device.set_num_threads(2)
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Both that the device computes in."""
    found: torch.dtype = request.param
    return found
