"""Sends requests as a load says: closed loop with N clients, or each at its time. Ctrl-C keeps what was measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from xllm_core.loadgen.client import LoadClient
from xllm_core.loadgen.samples import Sample
from xllm_core.loadgen.workload import Ask, Prompts


@dataclass(slots=True)
class Run:
    """What came of a load. samples: of every request that was begun, in the order of beginning."""

    samples: list[Sample] = field(default_factory=list)
    duration_s: float = 0.0
    client_cpu_s: float = 0.0
    is_interrupted: bool = False


async def run_load(
    client: LoadClient, asks: Sequence[Ask], prompts: Prompts, *, num_clients: int | None, show: bool | None = None
) -> Run:
    """Send all requests and wait for all answers.

    num_clients: each sends its next request when its last is answered; None sends every request at its `due_s`, whatever is
    still unanswered. Cancelled (Ctrl-C), it drops what is under way, as "unfinished", and returns what there is.
    show: a progress bar; None shows one on a terminal.
    """
    run = Run()
    with tqdm(total=len(asks), desc="requests", unit="req", disable=None if show is None else not show) as bar:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()

        async def one(ask: Ask) -> None:
            body = client.target.body(ask, prompts)
            sample = Sample(ask.index, ask.input_tokens, ask.output_tokens, ask.due_s)
            run.samples.append(sample)
            await client.send(sample, body, start_s)
            bar.update()

        tasks = _closed(asks, num_clients, one) if num_clients is not None else [_at_due_times(asks, one, start_s)]
        running = [asyncio.create_task(task) for task in tasks]
        try:
            await asyncio.gather(*running)
        except asyncio.CancelledError:
            if (current := asyncio.current_task()) is not None:
                current.uncancel()
            run.is_interrupted = True
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        run.duration_s, run.client_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    return run


async def warm_up(client: LoadClient, asks: Iterable[Ask], prompts: Prompts) -> Sample | None:
    """Send a few short requests one after the other, unmeasured; returns the first that failed."""
    for ask in asks:
        sample = Sample(ask.index, ask.input_tokens, ask.output_tokens)
        await client.send(sample, client.target.body(ask, prompts, min(4, ask.output_tokens)), time.perf_counter())
        if sample.outcome != "ok":
            return sample
    return None


_Job = Coroutine[Any, Any, None]


def _closed(asks: Sequence[Ask], num_clients: int, one: Callable[[Ask], _Job]) -> list[_Job]:
    shared: Iterator[Ask] = iter(asks)

    async def work() -> None:
        for ask in shared:
            await one(ask)

    return [work() for _ in range(min(num_clients, len(asks)))]


async def _at_due_times(asks: Sequence[Ask], one: Callable[[Ask], _Job], start_s: float) -> None:
    async with asyncio.TaskGroup() as group:
        for ask in asks:
            delay_s = (ask.due_s or 0.0) - (time.perf_counter() - start_s)
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            group.create_task(one(ask))
