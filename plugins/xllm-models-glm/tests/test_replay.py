"""Experts on xllm-cpu: steps are replayed from graphs, and a token weighs its experts alike among any neighbours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_core import LLM, SamplingParams
from xllm_core.config import Settings
from xllm_core.engine.build import build_engine
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import assemble
from xllm_core.testing.driving import drive
from xllm_core.types import EngineRequest

isa = pytest.importorskip("xllm_cpu.isa", reason="the plugin xllm-cpu is not installed")
pytestmark = pytest.mark.skipif(not isa.runnable(), reason="no kernels were built for this processor")

CPU = {"device": "cpu/cpu", "num_blocks": 300, "max_num_seqs": 16, "num_threads": 2}
PLAIN = {"graphs": False, "enable_prefix_cache": False, "overlap": False}
EIGHT = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "max_position_embeddings": 512}
PROMPTS = [
    [(i * 7 + j * j + 3) % 120 for j in range(length)]
    for i, length in enumerate((1, 1, 2, 3, 5, 9, 13, 17, 40, 70, 260))
]


def answers(llm: LLM, prompts: list[list[int]]) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Tokens, and the log probabilities of three candidates for each."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [
        (list(one.token_ids), [{token: entry.logprob for token, entry in at.items()} for at in one.logprobs or []])
        for one in (answer.outputs[0] for answer in found)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [EIGHT, {"max_position_embeddings": 512}], ids=["eight", "groups"])
def test_a_crowd_says_what_each_says_alone(tiny: Callable[..., Path], dtype: str, fields: dict[str, Any]) -> None:
    """To the last bit of every log probability, replayed and op by op. Dies with a sigmoid that depends on where in the step a token stands."""
    path = str(tiny("moe", **fields))
    with LLM(path, dtype=dtype, **CPU) as llm:
        crowd = answers(llm, PROMPTS)
    with LLM(path, dtype=dtype, **CPU, **PLAIN) as llm:
        for prompt, said in zip(PROMPTS, crowd, strict=True):
            assert answers(llm, [prompt]) == [said], f"a prompt of {len(prompt)}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_replayed(tiny: Callable[..., Path], dtype: str) -> None:
    """Every option of router and attention on; what the experts got is counted in replays too. Dies with an op that no graph can hold."""
    settings = Settings.from_flags(path=str(tiny("moe")), dtype=dtype, overlap=False, **CPU)
    one = build_engine(assemble(settings, PluginManager.discover(settings).load()), settings)

    def counted() -> list[int]:
        return [int(counts.sum()) for counts in one.loaded.parts.expert_counts().values()]

    params = SamplingParams(max_tokens=9, ignore_eos=True)
    try:
        drive(one.engine, [EngineRequest(str(i), tuple(range(1, 4 + i)), params, seed=i) for i in range(4)])
        before, stats = counted(), one.worker.graph_stats()
        assert stats is not None and not stats.why_not and stats.num_eager == 0
        assert (
            stats.num_replays == one.engine.num_replays == 7
        )  # the prompts' step and the first of the others were recorded
        drive(one.engine, [EngineRequest(str(i), tuple(range(1, 4 + i)), params, seed=i) for i in range(4)])
        assert one.engine.num_replays == 7 + 9
        tokens = 3 + 4 + 5 + 6 + 4 * 8
        assert [new - old for new, old in zip(counted(), before, strict=True)] == [3 * tokens] * 2
    finally:
        one.engine.close()
