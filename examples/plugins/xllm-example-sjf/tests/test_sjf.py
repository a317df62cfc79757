"""The policy by itself, and in a real engine with a tiny random model."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from xllm_example_sjf.policy import ShortestJobFirst

from xllm_core import AsyncEngine, SamplingParams
from xllm_core.plugins import SequenceView


def view(order: int, todo: int, new: int, arrival_s: float = 0.0) -> SequenceView:
    """A sequence that wants `new` tokens."""
    return SequenceView(f"r{order}", order, arrival_s, 0, False, todo, 0, new, todo, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A random Llama of two layers."""
    path: Path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    weights = {name: value.contiguous() for name, value in LlamaForCausalLM(config).state_dict().items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    yield str(path)


def test_the_shortest_first() -> None:
    """Prompt and answer both count; equals keep their order."""
    policy = ShortestJobFirst(0)
    waiting = [view(0, 100, 10), view(1, 5, 200), view(2, 5, 10), view(3, 10, 5)]
    assert list(policy.order(waiting, now_s=9.0)) == [2, 3, 0, 1]
    assert list(policy.victims(waiting, now_s=9.0)) == [1, 0, 3, 2]


def test_waiting_makes_it_shorter() -> None:
    """A long job that has waited long enough passes a short one that came just now, and no sooner."""
    policy = ShortestJobFirst(100.0)
    long, short = view(0, 100, 500, arrival_s=0.0), view(1, 10, 10, arrival_s=5.7)
    assert list(policy.order([long, short], now_s=5.7)) == [1, 0]
    short = view(1, 10, 10, arrival_s=5.9)
    assert list(policy.order([long, short], now_s=5.9)) == [0, 1]


def test_any_queue_is_ordered_whole() -> None:
    """Each index once, the same order again, chunks within the contract: over random queues."""
    draw = random.Random(0)
    policy = ShortestJobFirst(50.0)
    for _ in range(200):
        queue = [view(i, draw.randint(1, 300), draw.randint(1, 300), draw.random()) for i in range(draw.randint(1, 20))]
        for answer in (policy.order, policy.victims):
            found = list(answer(queue, 2.0))
            assert sorted(found) == list(range(len(queue))) and found == list(answer(queue, 2.0))
        budget = draw.randint(1, 400)
        assert 1 <= policy.chunk(queue[0], budget) <= min(queue[0].todo_tokens, budget)


def finish_order(model: str, **settings: Any) -> tuple[list[int], list[list[int]]]:
    """Requests in the order in which they end, one running at a time; and their tokens. The longest runs when the others come."""
    lengths = [40, 20, 10, 5]
    ended: list[int] = []
    tokens: list[list[int]] = [[] for _ in lengths]
    is_running = asyncio.Event()

    async def one(engine: AsyncEngine, i: int) -> None:
        if i:
            await is_running.wait()
        params = SamplingParams(max_tokens=lengths[i], temperature=0.0, ignore_eos=True)
        async for output in engine.generate({"prompt_token_ids": [3, 1, 4]}, params, request_id=str(i)):
            is_running.set()
            if output.finished:
                ended.append(i)
                tokens[i] = list(output.outputs[0].token_ids)

    async def run() -> None:
        with AsyncEngine(model, dtype="float32", num_blocks=64, max_num_seqs=1, **settings) as engine:
            await asyncio.gather(*(one(engine, i) for i in range(len(lengths))))

    asyncio.run(run())
    return ended, tokens


def test_in_an_engine(model: str) -> None:
    """Chosen and configured by settings, it turns the queue round and changes no answer."""
    first, expected = finish_order(model)
    settings = {"use": {"scheduler": "example-sjf/sjf"}, "plugin": {"example-sjf": {"ageing_tokens_per_s": 0.0}}}
    shortest, found = finish_order(model, **settings)
    assert first == [0, 1, 2, 3]
    assert shortest == [0, 3, 2, 1]
    assert found == expected
