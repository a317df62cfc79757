"""The one command for a real NPU: it runs to its end on the soft one, and refuses politely where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xllm_core.testing.tiny import tiny_config, write_tiny
from xllm_core.testing.verify import ROWS

PROCESSES = Path(__file__).parent / "soft" / "processes"
RUN = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from xllm_core.cli import main; sys.exit(main())"


def bringup(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    environment = {**os.environ, **more}
    path = [str(PROCESSES), *sys.path]
    command = [sys.executable, "-c", RUN, json.dumps(path), "ascend", "bringup", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, check=False)


def test_without_an_npu_it_says_what_is_missing() -> None:
    """Exit code 2, words for people and a line for programs. Killed by: a command that starts its parts all the same."""
    done = bringup("nothing", LD_LIBRARY_PATH="")
    assert done.returncode == 2 and "no NPU can be used here: no CANN" in done.stderr, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is False


@pytest.mark.nightly
def test_all_of_it_on_the_soft_npu(tmp_path: Path) -> None:
    """Conformance, the matrix and a figure, each asked of `ascend/npu`. Killed by: an option of a command that does not exist any more."""
    model = write_tiny(tiny_config("Qwen3ForCausalLM", hidden_size=64, initializer_range=0.5), tmp_path / "tiny")
    done = bringup(str(model), "--quick", "--num-prompts", "4", "--input-len", "8", "--output-len", "4")
    report = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and report["ok"], done.stdout[-3000:] + done.stderr[-3000:]
    assert report["machine"]["npu"] == "Ascend910B1" and len(report["verify"]["report"]["rows"]) == len(ROWS)
    assert report["conformance"]["report"]["device"] == {"npu": "Ascend910B1"}
    assert report["throughput"]["report"]["output_tokens_per_s"] > 0
