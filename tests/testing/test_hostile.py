"""The hostile device: an engine on a device that shares no habit with the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fixtures.tiny_models import make_tiny
from tests.testing.conftest import Install
from xllm_core import LLM, SamplingParams
from xllm_core.testing import check_plugin
from xllm_core.testing.hostile import disarm_cuda, hostile_cuda
from xllm_core.testing.verify import QUICK, ROWS, Verifier


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A window in one layer, none in the other, so that there are two KV groups."""
    return str(
        make_tiny(
            "qwen3", tmp_path_factory.mktemp("hostile") / "tiny", max_position_embeddings=1024, initializer_range=0.5,
            use_sliding_window=True, sliding_window=20, layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip


@pytest.fixture(autouse=True)
def hostile(install: Install) -> Iterator[None]:
    """The plugin is installed; the trap is taken away afterwards."""
    install("hostile")
    yield
    disarm_cuda()


def test_an_engine_says_the_same(model: str) -> None:
    """Prompts around the edges of its blocks, greedy and seeded, several at once: the reference's tokens. Dies with any place that takes
    slots before heads, blocks of 16 or bfloat16 for granted.
    """
    prompts = [
        {"prompt_token_ids": [(7 * i + length) % 128 for i in range(length)]} for length in (1, 23, 24, 25, 49, 100)
    ]
    answers = []
    for device in ("hostile/hostile", "core/reference"):
        with LLM(model, device=device, dtype="float32", num_blocks=256, max_num_batched_tokens=64) as llm:
            said = [
                [list(o.outputs[0].token_ids) for o in llm.generate(prompts, SamplingParams(max_tokens=30, ignore_eos=True, seed=4, temperature=t))]
                for t in (0.0, 0.9)
            ]  # fmt: skip
            answers.append(said)
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0][0]}) == len(prompts)


def test_every_feature_runs_on_it(tmp_path: Path) -> None:
    """The matrix of `xllm verify`: every row identical and active, but for a store, which no plugin brings here, and what the device lacks."""
    model = str(make_tiny("llama", tmp_path / "llama", max_position_embeddings=1024, initializer_range=0.5))
    report = Verifier(model, scale=QUICK, memory_bytes=1 << 24, use={"device": "hostile/hostile"}).run()
    assert [row.feature for row in report.rows] == list(ROWS)
    assert report.has_passed, [
        (row.feature, row.differences, row.activity) for row in report.rows if not row.has_passed
    ]
    assert [row.feature for row in report.rows if row.not_applicable] == [
        "log probabilities",
        "plugin's store",
        "graph replay",
    ]
    assert report.device == "hostile reference"


def test_it_conforms() -> None:
    """Every suite for what it offers."""
    report = check_plugin("hostile")
    assert report.ok, report.text
    assert report.device["hostile"] == "hostile reference"


def test_looking_at_cuda_is_an_error() -> None:
    """For us; torch itself may. Dies with a trap that does not spring."""
    with hostile_cuda(), pytest.raises(AssertionError, match=r"looked at torch\.cuda\.is_available"):
        torch.cuda.is_available()
    with hostile_cuda():
        torch.manual_seed(3)
    assert torch.cuda.is_available() in (True, False)


def test_another_dtype_is_refused(model: str, tmp_path: Path) -> None:
    """bfloat16 is not served in silence as something else."""
    with pytest.raises(Exception, match="bfloat16"):
        LLM(model, device="hostile/hostile", dtype="bfloat16", num_blocks=16)
