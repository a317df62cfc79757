"""Ctrl-C while a model computes: the call ends, the model stays whole. Real signals, from a thread that sends them at odd moments."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from xllm_core import LLM, SamplingParams
from xllm_core.commands.streaming import stream_answer

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module", params=[False, True], ids=["one plan", "overlap"])
def llm(tiny_model: str, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(tiny_model, dtype="float32", memory_bytes=1 << 24, max_num_seqs=8, overlap=request.param) as it:
        yield it


@contextmanager
def interrupt_after(llm: LLM, num_steps: int, delay_s: float) -> Iterator[None]:
    """SIGINT some steps after now: in the middle of one, most likely, since there is little else."""
    scheduler = llm.processor.client.engine.scheduler  # type: ignore[attr-defined]
    start = scheduler.stats.num_steps

    def send() -> None:
        while scheduler.stats.num_steps < start + num_steps:
            time.sleep(0.0002)
        time.sleep(delay_s)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_an_interrupted_model_answers_the_next_request(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate` and the terminal's stream, many times over. Red if the signal lands inside a step: some later answer is wrong, or none."""
    engine = llm.processor.client.engine  # type: ignore[attr-defined]
    prompts = ["one", "two", [9] * 30]
    before = [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)]
    for i in range(12):
        with pytest.raises(KeyboardInterrupt), interrupt_after(llm, 1 + i, i * 0.00017):
            if i % 2:
                stream_answer(llm.processor, "interrupted", LONG)
            else:
                llm.generate(["interrupted"] * 3, LONG)
        assert engine.scheduler.live_sequences() == {}
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)] == before
    assert engine.scheduler.kv.usage()[0] == 0
    capsys.readouterr()
