"""The load generator against `xllm serve` itself: both sides must count the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.e2e.conftest import tiny_model
from tests.server.rig import Server, serving
from xllm_core.cli import root

__all__ = ["tiny_model"]

pytestmark = pytest.mark.slow
COUNTERS = {
    "completed": "vllm:request_success_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "output_tokens": "vllm:generation_tokens_total",
    "cached_tokens": "vllm:prefix_cache_hits_total",
}


@pytest.fixture(scope="module")
def real(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny model, context 512."""
    log = tmp_path_factory.mktemp("bench") / "log.txt"
    with serving(
        tiny_model, log, "--dtype", "float32", "--num-blocks", "512", "--served-model-name", "tiny"
    ) as running:
        yield running


def measure(real: Server, *arguments: str) -> dict[str, Any]:
    """Run, compare with the server's own counters, and return the figures."""
    before = {name: real.metric(name) for name in COUNTERS.values()}
    options = ("--url", real.url, "--vocab-size", "128", "--num-warmups", "0", *arguments)
    result = CliRunner().invoke(root(), ["bench", "serve", *options])
    assert result.exit_code == 0, (result.output, result.exception)
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    real.wait_idle()
    for figure, name in COUNTERS.items():
        assert figures[figure] == real.metric(name) - before[name], (figure, figures)
    assert figures["ttft_ms"]["p50"] > 0 and figures["without_usage"] == figures["shorter_than_asked"] == 0
    return figures


def test_closed_and_open_loop(real: Server) -> None:
    """Every request is answered with every token asked for. Dies if the client drops the end of a stream, or asks for something else."""
    figures = measure(real, "--clients", "4", "--num-requests", "12", "--input-len", "40", "--output-len", "9")
    assert (figures["completed"], figures["prompt_tokens"], figures["output_tokens"]) == (12, 480, 108)
    assert figures["cached_tokens"] == 0
    figures = measure(
        real, "--rate", "50", "--num-requests", "10", "--input-len", "33", "--output-len", "5", "--seed", "7"
    )
    assert (figures["completed"], figures["prompt_tokens"], figures["output_tokens"]) == (10, 330, 50)


def test_chat(real: Server) -> None:
    """Words through the model's template."""
    arguments = (
        "--endpoint",
        "chat",
        "--prompt-mode",
        "text",
        "--num-requests",
        "4",
        "--input-len",
        "10",
        "--output-len",
        "6",
    )
    result = CliRunner().invoke(root(), ["bench", "serve", "--url", real.url, *arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout.splitlines()[-1])["output_tokens"] == 24


def test_shared_prefixes_of_a_trace_hit_the_cache(real: Server, tmp_path: Path) -> None:
    """Three requests share two blocks, 64 tokens each here; the last two find both. Dies if equal ids give other tokens."""
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 0, "input_length": 1200, "output_length": 40, "hash_ids": [3, 4, own]} for own in (5, 6, 7)]
    path.write_text("\n".join(map(json.dumps, rows)))
    figures = measure(real, "--trace", str(path), "--length-factor", "0.125", "--clients", "1")
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (450, 15)
    assert figures["cached_tokens"] == 2 * 128
