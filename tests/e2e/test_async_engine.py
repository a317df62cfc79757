"""`AsyncEngine`: streams, aborts and cancellation on one event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from xllm_core import LLM, AsyncEngine, SamplingParams
from xllm_core.errors import EngineDeadError, InvalidRequestError, PromptTooLongError
from xllm_core.frontend.processor import Prompt
from xllm_core.types import RequestOutput, TokenOutput

PARAMS = SamplingParams(temperature=1.0, seed=4, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_model: str) -> Iterator[AsyncEngine]:
    with AsyncEngine(tiny_model, dtype="float32", memory_bytes=1 << 24, max_num_seqs=16) as it:
        yield it


async def collect(
    engine: AsyncEngine, prompt: Prompt, params: SamplingParams = PARAMS, **options: str
) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **options)]


def used_blocks(engine: AsyncEngine) -> int:
    return engine.processor.client.engine.scheduler.kv.usage()[0]  # type: ignore[attr-defined]


def scheduler(engine: AsyncEngine) -> Any:
    return engine.processor.client.engine.scheduler  # type: ignore[attr-defined]


async def wait_for_steps(engine: AsyncEngine, num_steps: int) -> None:
    """Until that many steps have been made from now on."""
    end = scheduler(engine).stats.num_steps + num_steps
    while scheduler(engine).stats.num_steps < end:
        await asyncio.sleep(0.0005)


async def wait_until_idle(engine: AsyncEngine) -> None:
    for _ in range(500):
        if not engine.processor.client.has_work and used_blocks(engine) == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{used_blocks(engine)} blocks are still used")


def test_streams_grow_and_equal_offline(engine: AsyncEngine, tiny_model: str) -> None:
    """Each item extends the last; the final one is what `LLM` gives. Red if items share their lists."""

    async def main() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(collect(engine, f"prompt {i}") for i in range(5)))

    streams = asyncio.run(main())
    with LLM(tiny_model, dtype="float32", memory_bytes=1 << 24) as llm:
        offline = llm.generate([f"prompt {i}" for i in range(5)], PARAMS)
    for items, whole in zip(streams, offline, strict=True):
        texts = [item.outputs[0].text for item in items]
        assert all(b.startswith(a) for a, b in pairwise(texts))
        counts = [len(item.outputs[0].token_ids) for item in items]
        assert counts == sorted(counts)
        assert len(set(counts)) > 20
        assert items[-1].finished
        assert items[-1].outputs[0].token_ids == whole.outputs[0].token_ids
        assert texts[-1] == whole.outputs[0].text


def test_leaving_a_stream_frees_its_blocks(engine: AsyncEngine) -> None:
    """Break, cancel and abort: the engine is empty soon after, and a neighbour is undisturbed."""

    async def main() -> tuple[str, str]:
        neighbour = asyncio.create_task(collect(engine, "neighbour"))
        async for _ in engine.generate("left early", SamplingParams(max_tokens=200, ignore_eos=True)):
            break
        cancelled = asyncio.create_task(collect(engine, "cancelled", SamplingParams(max_tokens=200, ignore_eos=True)))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        aborted = asyncio.create_task(
            collect(engine, "aborted", SamplingParams(max_tokens=200, ignore_eos=True), request_id="mine")
        )
        await asyncio.sleep(0.05)
        await engine.abort("mine")
        last = (await aborted)[-1]
        assert last.outputs[0].finish_reason == "abort"
        together = (await neighbour)[-1].outputs[0].text
        await wait_until_idle(engine)
        return together, (await collect(engine, "neighbour"))[-1].outputs[0].text

    together, alone = asyncio.run(main())
    assert together == alone


def test_refusals_reach_their_own_caller(engine: AsyncEngine) -> None:
    """A bad request raises where it was made; an id in use is refused."""

    async def main() -> None:
        with pytest.raises(InvalidRequestError, match="temperature"):
            await collect(engine, "x", SamplingParams(temperature=-1))
        first = asyncio.create_task(collect(engine, "x", PARAMS, request_id="same"))
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequestError, match="in use"):
            await asyncio.gather(collect(engine, "y", PARAMS, request_id="same"))
        await first

    asyncio.run(main())


def test_after_shutdown_callers_are_told(tiny_model: str) -> None:
    """A stream under way and a new one both end with EngineDeadError; nobody waits for ever."""
    engine = AsyncEngine(tiny_model, dtype="float32", memory_bytes=1 << 24)

    async def main() -> None:
        running = asyncio.create_task(collect(engine, "x", SamplingParams(max_tokens=400, ignore_eos=True)))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(engine.shutdown)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(running, 5)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(collect(engine, "y"), 5)

    asyncio.run(main())


@pytest.fixture(scope="module")
def slow_prefill(tiny_model: str) -> Iterator[AsyncEngine]:
    """A prompt takes as many steps as it has tokens."""
    with AsyncEngine(
        tiny_model, dtype="float32", memory_bytes=1 << 24, max_chunk_tokens=1, enable_prefix_cache=False
    ) as it:
        yield it


LONG_PROMPT = [7, 8, 9] * 160
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def test_a_short_request_passes_a_long_prefill(slow_prefill: AsyncEngine) -> None:
    """It comes while the long one is computed, and is answered first. Red if a poll lasts until something comes out."""

    async def main() -> list[str]:
        order: list[str] = []

        async def ask(name: str, prompt: Prompt) -> None:
            await collect(slow_prefill, prompt, ONE)
            order.append(name)

        long = asyncio.create_task(ask("long", LONG_PROMPT))
        await wait_for_steps(slow_prefill, 5)
        await ask("short", [5, 6])
        await long
        return order

    assert asyncio.run(main()) == ["short", "long"]


def test_cancelling_a_long_prefill_ends_it(slow_prefill: AsyncEngine) -> None:
    """Counted in steps: far fewer than its tokens. Red if a poll lasts until something comes out."""

    async def main() -> int:
        before = scheduler(slow_prefill).stats.num_steps
        task = asyncio.create_task(collect(slow_prefill, LONG_PROMPT, ONE))
        await wait_for_steps(slow_prefill, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until_idle(slow_prefill)
        return scheduler(slow_prefill).stats.num_steps - before

    assert asyncio.run(main()) < len(LONG_PROMPT) // 2


def test_an_abort_ends_every_sequence(engine: AsyncEngine) -> None:
    """n > 1: all are marked, none goes on. Red if only the first is."""

    async def main() -> RequestOutput:
        params = SamplingParams(n=3, max_tokens=400, ignore_eos=True)
        task = asyncio.create_task(collect(engine, "several", params, request_id="several"))
        await wait_for_steps(engine, 5)
        await engine.abort("several")
        last = (await task)[-1]
        await wait_until_idle(engine)
        return last

    last = asyncio.run(main())
    assert [o.finish_reason for o in last.outputs] == ["abort"] * 3
    assert last.finished
    assert scheduler(engine).live_sequences() == {}


def test_bad_requests_do_not_disturb_those_in_flight(engine: AsyncEngine) -> None:
    """Every way of being refused, while neighbours run: they say what they say alone. Red if a refusal stops a step or a stream."""
    bad: list[tuple[Any, Any, type[Exception]]] = [
        ("", PARAMS, InvalidRequestError), ([1, 9999], PARAMS, InvalidRequestError), ([3] * 600, PARAMS, PromptTooLongError),
        ("x", SamplingParams(temperature=5), InvalidRequestError), ("x", SamplingParams(n=17), InvalidRequestError),
        ("x", {"n": 1}, InvalidRequestError), ("x", SamplingParams(stop=5), InvalidRequestError),  # type: ignore[arg-type]
        ("x", SamplingParams(max_tokens=600), InvalidRequestError), ("\ud800", PARAMS, InvalidRequestError),
    ]  # fmt: skip

    async def main() -> tuple[list[str], list[str]]:
        prompts = [f"neighbour {i}" for i in range(3)]
        alone = [(await collect(engine, prompt))[-1].outputs[0].text for prompt in prompts]
        tasks = [asyncio.create_task(collect(engine, prompt)) for prompt in prompts]
        for prompt, params, error in bad:
            await wait_for_steps(engine, 1)
            with pytest.raises(error):
                await collect(engine, prompt, params)
        together = [(await task)[-1].outputs[0].text for task in tasks]
        await wait_until_idle(engine)
        return alone, together

    alone, together = asyncio.run(main())
    assert alone == together


def test_a_request_that_fails_alone_ends_alone(tiny_model: str) -> None:
    """Its tokens cannot be decoded: its last item says so, the neighbour ends as usual. Red if the engine's thread ends."""
    with AsyncEngine(tiny_model, dtype="float32", memory_bytes=1 << 24) as engine:
        tokenizer = engine.processor.tokenizer
        assert tokenizer is not None
        decode = tokenizer.decode

        def broken(ids: Any, *, skip_special_tokens: bool = True) -> str:
            if 42 in ids:
                raise RuntimeError("token 42 has no text")
            return decode(ids, skip_special_tokens=skip_special_tokens)

        tokenizer.decode = broken  # type: ignore[method-assign]
        neighbour = replace(PARAMS, logit_bias={42: -100})

        async def main() -> tuple[RequestOutput, RequestOutput]:
            good = asyncio.create_task(collect(engine, "x", neighbour))
            bad = (await collect(engine, "x", SamplingParams(temperature=0, logit_bias={42: 100}, max_tokens=9)))[-1]
            last = (await good)[-1]
            await wait_until_idle(engine)
            return bad, last

        bad, good = asyncio.run(main())
        assert (bad.finished, bad.error, bad.outputs[0].finish_reason) == (
            True,
            "RuntimeError: token 42 has no text",
            "error",
        )
        assert (good.error, good.outputs[0].finish_reason, len(good.outputs[0].token_ids)) == (None, "length", 30)


def test_what_the_caller_changes_later_has_no_effect(engine: AsyncEngine) -> None:
    """Everything is copied in the call itself, before the first item is awaited. Red if it is read when the engine gets to it."""
    bias, prompt = {42: 100.0}, [5, 6, 7]

    async def main() -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=3, logit_bias=bias, ignore_eos=True)
        answers = engine.generate(prompt, params)
        bias.clear()
        prompt.append(10**6)
        return [item async for item in answers][-1].outputs[0].token_ids

    assert asyncio.run(main()) == [42] * 3


def test_items_share_nothing_that_changes(engine: AsyncEngine) -> None:
    """Red if an item keeps the list or the times that the next step fills."""

    async def main() -> list[tuple[RequestOutput, int, float | None]]:
        params = replace(PARAMS, prompt_logprobs=0, logprobs=0, max_tokens=6)
        return [
            (item, len(item.outputs[0].token_ids), item.metrics.finished_s if item.metrics else 0.0)
            async for item in engine.generate("some prompt", params)
        ]

    items = asyncio.run(main())
    assert len(items) >= 6
    for (a, num_tokens, finished_s), (b, _, _) in pairwise(items):
        assert a.metrics is not None and b.metrics is not None and a.prompt_logprobs is not None
        assert a.metrics is not b.metrics
        assert a.prompt_logprobs is not b.prompt_logprobs
        assert a.metrics.finished_s == finished_s is None
        assert len(a.outputs[0].token_ids) == num_tokens == len(a.outputs[0].logprobs or ())


def test_callers_whose_loop_is_gone_leave_nothing_behind(engine: AsyncEngine) -> None:
    """The loop closes before anybody could tell it anything; the engine stops their requests and rests. Red if it waits for the loop."""
    gate, num_aborted = threading.Event(), scheduler(engine).stats.num_aborted

    async def main() -> None:
        engine._commands.put(gate.wait)  # the engine's thread comes to what follows when this loop is closed
        answers = engine.generate("orphan", SamplingParams(max_tokens=400, ignore_eos=True))
        task = asyncio.ensure_future(anext(answers))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    gate.set()

    async def after() -> str:
        while scheduler(engine).stats.num_aborted == num_aborted:  # bounded by the wait_for below
            await asyncio.sleep(0.01)
        await wait_until_idle(engine)
        assert engine._streams == {}
        assert scheduler(engine).stats.num_aborted == num_aborted + 1
        return (await collect(engine, "next"))[-1].outputs[0].finish_reason or ""

    assert asyncio.run(asyncio.wait_for(after(), 20)) == "length"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended(tiny_model: str) -> None:
    """A step fails, then closing fails: streams under way, commands in the queue and later callers all hear of it. Red if one hangs."""
    engine = AsyncEngine(tiny_model, dtype="float32", memory_bytes=1 << 24)
    client, gate = engine.processor.client, threading.Event()
    close = client.close

    def failing_poll() -> list[TokenOutput]:
        gate.wait()
        raise RuntimeError("the device is gone")

    def failing_close() -> None:
        close()
        raise RuntimeError("and cannot be closed")

    client.poll, client.close = failing_poll, failing_close  # type: ignore[method-assign]

    async def main() -> None:
        first = asyncio.create_task(collect(engine, "x"))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(collect(engine, "y"))  # its command is not read before the end
        await asyncio.sleep(0)
        started = engine.generate("z")  # checked while the engine lives, awaited when it does not
        gate.set()
        for task in (first, second):
            with pytest.raises(EngineDeadError, match="the device is gone"):
                await asyncio.wait_for(task, 5)
        await asyncio.to_thread(engine._thread.join, 5)
        with pytest.raises(EngineDeadError, match="the device is gone"):
            await asyncio.wait_for(anext(started), 5)
        with pytest.raises(EngineDeadError, match="the device is gone"):
            engine.generate("late")

    asyncio.run(main())
    engine.shutdown()
