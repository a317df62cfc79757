"""Through `LLM`: what is reported equals transformers, and no feature of the engine changes a token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xllm_core import LLM, SamplingParams
from xllm_core.testing.tiny import load_oracle
from xllm_core.testing.verify import QUICK, Verifier

VOCAB = 20  # as many as an engine reports log probabilities of, so that the whole distribution is compared
SHARED = [3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]
PROMPTS = [[*SHARED, 4, 6, 2, 6], [*SHARED, 7, 1], [4, 3, 3, 8, 3, 2, 7, 9, 5, 4], [17]]
REFERENCE = {"device": "core/reference"}  # other devices that are installed may lack the ops of experts
KINDS = ("glm", "glm4", "moe")
MODES: dict[str, dict[str, Any]] = {
    "together": {},
    "in chunks of 5": {"max_chunk_tokens": 5},
    "one at a time, with prefix hits": {"max_num_seqs": 1},
    "preempted": {"num_blocks": 12, "max_num_seqs": 4},
}


def answered(path: Path, prompts: list[list[int]], **settings: Any) -> tuple[list[Any], dict[str, Any]]:
    """(answers with every log probability, what the engine counted)."""
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=VOCAB)
    with LLM(
        str(path),
        **{"dtype": "float32", "num_blocks": 64, "block_size": 4, "max_model_len": 48, "use": REFERENCE, **settings},
    ) as llm:
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        stats = llm.processor.client.engine.scheduler.stats
        return answers, {"preemptions": stats.num_preemptions, "hits": sum(a.num_cached_tokens or 0 for a in answers)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_every_log_probability_is_transformers(tiny: Callable[..., Path], kind: str, mode: str) -> None:
    """At each decode step, to 1e-4. A mode that did not happen proves nothing. Killed by: keys cached before they are turned, stale blocks."""
    path = tiny(kind, vocab_size=VOCAB)
    answers, counted = answered(path, PROMPTS, **MODES[mode])
    if mode == "preempted":
        assert counted["preemptions"] > 0
    if "hits" in mode:
        assert counted["hits"] >= 16
    oracle = load_oracle(path)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = answer.outputs[0].token_ids
        with torch.no_grad():
            expected = oracle(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
        assert len(tokens) == 10
        for row, entries in zip(expected, answer.outputs[0].logprobs, strict=False):
            assert all(math.isclose(entries[t].logprob, float(row[t]), abs_tol=1e-4, rel_tol=0) for t in range(VOCAB))


def test_any_of_several_end_tokens_ends(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """GLM names three. Killed by: reading the first of the list."""
    path = tiny("glm4", vocab_size=VOCAB)
    said = answered(path, PROMPTS)[0][0].outputs[0].token_ids
    end = said[4]
    for source in path.iterdir():
        (tmp_path / source.name).symlink_to(source)
    for name in ("config.json", "generation_config.json"):
        given = json.loads((path / name).read_text())
        (tmp_path / name).unlink()
        (tmp_path / name).write_text(json.dumps(given | {"eos_token_id": [VOCAB - 1, end]}))
    with LLM(str(tmp_path), dtype="float32", num_blocks=64, block_size=4, use=REFERENCE) as llm:
        [answer] = llm.generate(
            [{"prompt_token_ids": PROMPTS[0]}], SamplingParams(temperature=0, max_tokens=10), use_tqdm=False
        )
    assert answer.outputs[0].finish_reason == "stop"
    assert len(answer.outputs[0].token_ids) <= 5


def test_features_change_no_token(tiny: Callable[..., Path]) -> None:
    """`xllm verify --quick` on the model with experts: batch mates, chunks, prefix cache, preemption, host store, forks, overlap."""
    path = tiny("moe", max_position_embeddings=1024, initializer_range=0.5)
    report = Verifier(str(path), dtype="float32", scale=QUICK, memory_bytes=1 << 24, use=REFERENCE).run()
    wrong = [
        f"{row.feature}: {row.differences or f'activity {row.activity}'}" for row in report.rows if not row.has_passed
    ]
    assert report.has_passed, "; ".join(wrong)
    assert sum(not row.not_applicable for row in report.rows) >= 10
