"""The one command for a real GPU: without one it refuses in words and JSON, and its dry run goes through all its parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from xllm_cuda_shim.device import ShimDevice

ROOT = Path(__file__).parents[3]


def benchmark(*arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, object]]:
    """The command as the README has it, and its last line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.cuda", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.stdout.strip(), done.stderr[-3000:]
    return done, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    """Killed by: parts that start all the same, or output that no program can read."""
    done, said = benchmark("--model", "nothing")
    assert done.returncode == 2 and said["ok"] is False and "no NVIDIA driver" in str(said["problem"])
    assert "--dry-run" in done.stderr


@pytest.mark.nightly
def test_a_part_that_fails_takes_nothing_with_it() -> None:
    """All of it on the reference; vLLM's environment is one in which every command fails. Killed by: an option of a command that does not exist
    any more, and by a failure that ends the command before its JSON.
    """
    done, said = benchmark("--dry-run", "--vllm-python", "/bin/false")
    ok = {name: said[name]["ok"] for name in ("conformance", "verify", "graphs", "throughput")}  # type: ignore[index]
    assert ok == {"conformance": True, "verify": True, "graphs": True, "throughput": False}, done.stdout[-3000:]
    assert (done.returncode, said["ok"]) == (1, False) and "vLLM failed" in said["throughput"]["words"]  # type: ignore[index]


@pytest.mark.slow
def test_every_kernel_has_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At a shape that the interpreter can do, each launched once, with a stopped clock. Killed by: a call that the kernels do not take any more."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.cuda import kernels

    small = {
        "HIDDEN": 32,
        "INNER": 48,
        "VOCAB": 64,
        "NUM_HEADS": 4,
        "NUM_KV_HEADS": 2,
        "HEAD_SIZE": 16,
        "CONTEXT": 512,
        "BATCH": 8,
    }
    for name, size in small.items():
        monkeypatch.setattr(kernels, name, size)

    class Bench(kernels.Bench):
        def __init__(self) -> None:
            self.device, self.where, self.bytes_per_s, self.operations_per_s = ShimDevice(), "cpu", 1e12, 1e15

        def new(self, *sizes: int) -> torch.Tensor:
            return torch.randn(sizes)

        @staticmethod
        def cold_us(launch: Callable[[], object]) -> float:
            launch()
            return 2.0

        replayed_us = cold_us

    bench = Bench()
    parts = (kernels.products, kernels.small, kernels.attention, kernels.sampling)
    rows = [row for part in parts for row in part(bench)]
    assert len(rows) == 8 + 4 + 6 + 3 and all(row.us == 2 and row.limit_us > 0 for row in rows)
    assert "linear head, 8 rows" in capsys.readouterr().out
    assert bench.row("some", 4.0, 10**6, 10**9).limit_us == 1.0  # a microsecond by either rate
