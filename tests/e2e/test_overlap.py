"""`[engine] overlap` on a real model: same answers, planned ahead, whole after failures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from xllm_core import LLM, SamplingParams
from xllm_core.engine.executor import InProcessExecutor, ThreadExecutor
from xllm_core.engine.metrics import early_share
from xllm_core.engine.scheduler import Scheduler
from xllm_core.errors import EngineDeadError
from xllm_core.reference.device import ReferenceDevice
from xllm_core.runtime.model_runner import ModelRunner, RunnerHandle
from xllm_core.types import StepPlan

PROMPTS = [[i + 5] * (3 * i + 1) for i in range(9)]


def engine_of(llm: LLM) -> Any:
    return llm.processor.client.engine  # type: ignore[attr-defined]


def test_the_setting_reaches_the_engine_and_changes_no_answer(tiny_model: str) -> None:
    """Greedy and seeded, n sequences, ends by text and by length, with logprobs. Red if a late token shows, or scores of another step."""
    several = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=20 + i, n=1 + i % 3, logprobs=1, stop=["a"] * (i % 2))
        for i in range(9)
    ]
    answers = {}
    for overlap, kind in ((False, InProcessExecutor), (True, ThreadExecutor)):
        with LLM(tiny_model, dtype="float32", memory_bytes=1 << 24, max_num_seqs=16, overlap=overlap) as llm:
            engine = engine_of(llm)
            assert isinstance(engine.executor, kind)
            assert engine.depth == 1 + overlap
            answers[overlap] = [o for answer in llm.generate(PROMPTS, several) for o in answer.outputs]
            if overlap:
                assert engine.scheduler.stats.num_wasted_rows > 0
    for ours, plain in zip(answers[True], answers[False], strict=True):
        assert (ours.token_ids, ours.text, ours.finish_reason) == (plain.token_ids, plain.text, plain.finish_reason)
        # The reference device's scores depend on the batch in the last bits.
        assert ours.cumulative_logprob == pytest.approx(plain.cumulative_logprob, abs=1e-3)
        assert len(ours.logprobs or ()) == len(ours.token_ids)
    assert {o.finish_reason for o in answers[True]} == {"stop", "length"}


def test_steps_of_a_real_model_are_planned_early(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine sequences, a hundred steps, and a forward that lasts until the next step has been planned or half a second is over.

    At least 90 % of the steps start before the forward of the one before has ended. Replays pass by what holds up a forward here, so there are
    none. Red if the engine waits for a result first.
    """
    schedule, compute = Scheduler.schedule, ModelRunner._compute
    is_planned, planned = threading.Condition(), [0]

    def told(self: Scheduler) -> StepPlan:
        plan = schedule(self)
        with is_planned:
            planned[0] = plan.step + 1
            is_planned.notify()
        return plan

    def patient(self: ModelRunner, handle: RunnerHandle, *arguments: Any) -> float:
        prepared_s = compute(self, handle, *arguments)
        with is_planned:
            is_planned.wait_for(lambda: planned[0] > handle.plan.step + 1, timeout=0.5)
        return prepared_s

    monkeypatch.setattr(Scheduler, "schedule", told)
    monkeypatch.setattr(ModelRunner, "_compute", patient)
    with LLM(tiny_model, dtype="float32", memory_bytes=1 << 24, max_num_seqs=16, overlap=True, graphs=False) as llm:
        llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        records = list(engine_of(llm).step_log.records)
    assert len(records) >= 100
    assert early_share(records) >= 0.9


def test_a_forward_that_fails_is_told_to_the_caller(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the worker's own error; the model can be closed, and says what happened if it is asked again."""
    with LLM(tiny_model, dtype="float32", memory_bytes=1 << 24, overlap=True) as llm:
        assert llm.generate(PROMPTS[:2], SamplingParams(max_tokens=3))

        def broken(self: ModelRunner, *arguments: Any) -> Any:
            raise MemoryError("the device is full")

        monkeypatch.setattr(ModelRunner, "_logits", broken)
        with pytest.raises(MemoryError, match="the device is full"):
            llm.generate(PROMPTS, SamplingParams(max_tokens=3))
        with pytest.raises(EngineDeadError, match="the device is full"):
            llm.generate(PROMPTS, SamplingParams(max_tokens=3))
    assert not any(thread.name == "xllm-worker" for thread in threading.enumerate())


class Late:
    """`AsyncDevice.to_host` of a device whose tokens come once the next step is launched, or when `patience_s` is over. overtaken: of each step,
    which of both it was. readers: threads that waited.
    """

    def __init__(self, patience_s: float = 0.5) -> None:
        self.overtaken: list[bool] = []
        self.readers: set[str] = set()
        self._patience_s = patience_s
        self._num_launched, self._launched = 0, threading.Condition()

    def to_host(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        copy = tensor.clone()
        with self._launched:
            self._num_launched += 1
            mine = self._num_launched
            self._launched.notify_all()

        def wait() -> torch.Tensor:
            with self._launched:
                self.overtaken.append(self._launched.wait_for(lambda: self._num_launched > mine, self._patience_s))
            self.readers.add(threading.current_thread().name)
            return copy

        return wait


def answers_of(llm: LLM, params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    return [list(o.token_ids) for answer in llm.generate(PROMPTS, params) for o in answer.outputs]


def test_a_device_computes_the_next_step_before_tokens_are_known(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a device can copy to the host while it computes, the worker launches a step and waits for none; the answers are the same. Red if
    the worker waits, or a step is computed from other tokens than the last one's.
    """
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=20 + i, n=1 + i % 3, ignore_eos=True) for i in range(9)
    ]
    settings: dict[str, Any] = {
        "dtype": "float32",
        "memory_bytes": 1 << 24,
        "device": "core/reference",
        "max_num_seqs": 32,
    }
    with LLM(tiny_model, **settings) as llm:
        expected = answers_of(llm, params)
    late = Late()
    monkeypatch.setattr(ReferenceDevice, "to_host", lambda self, tensor: late.to_host(tensor), raising=False)
    with LLM(tiny_model, **settings) as llm:
        assert answers_of(llm, params) == expected
    assert len(late.overtaken) >= 27 and sum(late.overtaken) >= 0.9 * len(late.overtaken), late.overtaken
    assert "xllm-worker" not in late.readers
    late = Late(patience_s=0)
    with LLM(tiny_model, overlap=False, **settings) as llm:
        assert answers_of(llm, params) == expected
    assert late.overtaken


def test_a_step_that_samples_nothing_is_waited_for_too(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in pieces: blocks of a piece are published, and may be saved, when it counts as done. Red if that is before it is computed."""
    late, sizes = Late(patience_s=0), []

    def to_host(self: ReferenceDevice, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        sizes.append(len(tensor))
        return late.to_host(tensor)

    monkeypatch.setattr(ReferenceDevice, "to_host", to_host, raising=False)
    settings: dict[str, Any] = {"memory_bytes": 1 << 24, "max_num_batched_tokens": 16, "max_num_seqs": 4}
    with LLM(tiny_model, dtype="float32", device="core/reference", **settings) as llm:
        llm.generate([{"prompt_token_ids": list(range(5, 55))}], SamplingParams(max_tokens=1), use_tqdm=False)
    assert sizes == [0, 0, 0, 1] and len(late.overtaken) == 4


def test_what_needs_tokens_on_the_host_gets_them_at_once(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties look at the last token before the next is chosen, log probabilities at that which was. Red if such a step is left pending."""
    params = [
        SamplingParams(temperature=0, max_tokens=8, repetition_penalty=1.3),
        SamplingParams(temperature=0, max_tokens=8, logprobs=2),
    ]
    settings: dict[str, Any] = {"dtype": "float32", "memory_bytes": 1 << 24, "device": "core/reference"}
    for some in params:
        with LLM(tiny_model, **settings) as llm:
            expected = answers_of(llm, some)
        late = Late()
        with monkeypatch.context() as patch:
            patch.setattr(
                ReferenceDevice, "to_host", lambda self, tensor, late=late: late.to_host(tensor), raising=False
            )
            with LLM(tiny_model, **settings) as llm:
                assert answers_of(llm, some) == expected
        assert late.overtaken == []


def test_a_failure_of_the_device_ends_the_engine(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes to light where tokens are waited for. Red if it stays there."""

    def broken(self: ReferenceDevice, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        def wait() -> torch.Tensor:
            raise RuntimeError("an illegal memory access was encountered")

        return wait

    monkeypatch.setattr(ReferenceDevice, "to_host", broken, raising=False)
    with LLM(tiny_model, dtype="float32", memory_bytes=1 << 24, device="core/reference") as llm:
        with pytest.raises((EngineDeadError, RuntimeError), match="illegal memory access"):
            answers_of(llm, SamplingParams(max_tokens=4))
        with pytest.raises(EngineDeadError, match="illegal memory access"):
            answers_of(llm, SamplingParams(max_tokens=4))
