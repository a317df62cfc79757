"""`AsyncEngine`: streams, aborts and cancellation on one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import pytest

from xllm_core import LLM, AsyncEngine, SamplingParams
from xllm_core.errors import EngineDeadError, InvalidRequestError
from xllm_core.types import RequestOutput

PARAMS = SamplingParams(temperature=1.0, seed=4, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny_model: str) -> Iterator[AsyncEngine]:
    with AsyncEngine(tiny_model, dtype="float32", memory_bytes=1 << 24, max_num_seqs=16) as it:
        yield it


async def collect(
    engine: AsyncEngine, prompt: str, params: SamplingParams = PARAMS, **options: str
) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, **options)]


def used_blocks(engine: AsyncEngine) -> int:
    return engine.processor.client.engine.scheduler.kv.usage()[0]  # type: ignore[attr-defined]


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
