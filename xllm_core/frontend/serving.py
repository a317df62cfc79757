"""Requests of many callers on one event loop, over engines in processes of their own. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xllm_core.engine.info import EngineInfo
from xllm_core.engine.messages import EngineStats, Loading, Phase, TextFiles
from xllm_core.errors import EngineDeadError, InvalidRequestError, QueueFullError, XllmError
from xllm_core.frontend.pool import EnginePool
from xllm_core.frontend.remote import EngineProcess
from xllm_core.plugins.contracts.weights import TokenizerFiles
from xllm_core.types import EngineRequest, RequestOutput, TokenOutput

if TYPE_CHECKING:
    # Imported when the engine processes have been started, and while they start.
    from xllm_core.frontend.processor import Prepared, Processor
    from xllm_core.frontend.template import ChatTemplate
    from xllm_core.frontend.tokenizer import Tokenizer

_PING_S = 2.0
_log = logging.getLogger("xllm.serve")


class RequestWatcher(Protocol):
    """What is told about requests, on the event loop; `xllm_core.server.metrics` is one. Times are monotonic seconds."""

    def submitted(self, request: EngineRequest) -> None:
        """A request was handed to an engine."""

    def admitted(self, request_id: str, now_s: float) -> None:
        """It left the queue for the first time."""

    def preempted(self, request_id: str) -> None:
        """It lost its place and waits again."""

    def tokens(self, outputs: Sequence[TokenOutput], now_s: float) -> None:
        """What one step brought."""

    def finished(self, output: RequestOutput, now_s: float) -> None:
        """It is over, in whatever way; its sequences say how."""

    def engine_stats(self, engine: int, stats: EngineStats) -> None:
        """State of an engine after a step."""


class Answer:
    """The requests of one caller: one per prompt. Read on the event loop; `outputs` are filled in place, in the order of the prompts.

    on_news: called at once when something has changed, and must not raise; True if that was dealt with, so that nobody who waits in
    `news` needs to be woken. A turn of the event loop for every token is what it saves.
    """

    def __init__(self, request_ids: Sequence[str], outputs: Sequence[RequestOutput]) -> None:
        self.request_ids = tuple(request_ids)
        self.outputs = tuple(outputs)
        self.error: XllmError | None = None
        self.on_news: Callable[[], bool] | None = None
        self._news = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        """Whether every request has its end."""
        return all(output.finished for output in self.outputs)

    async def news(self) -> None:
        """Wait until something has changed since the last call. Raises what ended the requests early."""
        await self._news.wait()
        self._news.clear()
        if self.error is not None:
            raise self.error

    def wake(self) -> None:
        """Something has changed."""
        if self.on_news is None or not self.on_news():
            self._news.set()


class Serving:
    """Engines, the text side, and every unfinished request. One event loop owns it: make it, `watch`, await `start`, `close`.

    tables: `Settings.tables()` for the engines. max_queue: requests that may wait for an engine's attention. engine_timeout_s: silence of
    an engine that has work after which `is_responsive` is False.
    """

    def __init__(
        self, tables: Mapping[str, Any], *, num_engines: int = 1, max_queue: int = 512, engine_timeout_s: float = 120.0,
        chat_template: str | None = None, use_generation_config: bool = True,
        on_start: Callable[[int, Phase | Loading], None] = lambda engine, event: None,
    ) -> None:  # fmt: skip
        self._tables = tables
        self._watcher: RequestWatcher
        self._max_queue = max_queue
        self._engine_timeout_s = engine_timeout_s
        self._chat_template = chat_template
        self._use_generation_config = use_generation_config
        self.death: asyncio.Event = asyncio.Event()
        self.failure: EngineDeadError | None = None
        self._processor: Processor | None = None
        self._answers: dict[str, Answer] = {}
        self._waiting: dict[str, None] = {}  # handed over, not yet admitted
        self._finish_times: list[float] = []
        self._ping_task: asyncio.Task[None] | None = None
        self.engines = tuple(
            EngineProcess(tables, on_output=self._take, on_death=self._die, on_start=partial(on_start, i))
            for i in range(num_engines)
        )
        self._pool = EnginePool(self.engines)
        self._sockets = [engine.spawn() for engine in self.engines]

    def watch(self, watcher: RequestWatcher) -> None:
        """Whom to tell of requests. Call it once, before `start`; it may be made while the engines are starting."""
        self._watcher = watcher

    async def start(self) -> EngineInfo:
        """Wait for the engines and open the tokenizer. Raises EngineStartError."""
        from xllm_core.frontend.processor import Processor

        first, *others = zip(self.engines, self._sockets, strict=True)
        starts = [asyncio.ensure_future(first[0].start(first[1]))]
        if (
            others and (planned := await first[0].planned()) is not None
        ):  # one discovers and decides, the others build the same
            starts += [asyncio.ensure_future(engine.start(sock, planned)) for engine, sock in others]
        opening = asyncio.ensure_future(self._open_text(first[0]))
        await asyncio.gather(*starts, opening)
        self._processor = Processor(self._pool, *opening.result())
        self._ping_task = asyncio.create_task(self._ping())
        return starts[0].result().info

    async def _open_text(self, engine: EngineProcess) -> tuple[Tokenizer | None, ChatTemplate | None, dict[str, Any]]:
        """Tokenizer, template and generation config, while the engine reads weights; nothing of it if it ended before."""
        if (text := await engine.text()) is None:
            return None, None, {}
        for warning in text.warnings:
            _log.warning("%s", warning)
        loop = asyncio.get_running_loop()
        tokenizer, template = await loop.run_in_executor(None, open_text, text, self._chat_template)
        return tokenizer, template, dict(text.generation_config) if self._use_generation_config else {}

    @property
    def is_ready(self) -> bool:
        """Whether requests are served."""
        return self._processor is not None and self.failure is None

    @property
    def is_responsive(self) -> bool:
        """Whether every engine has said something lately."""
        oldest_s = min(engine.last_heard_s for engine in self.engines)
        return not self.is_ready or time.monotonic() - oldest_s < self._engine_timeout_s

    @property
    def processor(self) -> Processor:
        """The text side. Raises EngineDeadError before `start` has ended, and after an engine has died."""
        if self.failure is not None:
            raise self.failure
        if self._processor is None:
            raise EngineDeadError("the engine is still starting; try again in a few seconds")
        return self._processor

    @property
    def num_unfinished(self) -> int:
        """Requests without an end."""
        return len(self._answers)

    @property
    def num_waiting(self) -> int:
        """Requests that no engine has begun."""
        return len(self._waiting)

    def retry_after_s(self) -> int:
        """When it is worth asking again: how long the queue of now takes at the pace of the last requests, from 1 to 60 s."""
        times = self._finish_times
        pace_s = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
        return max(1, min(60, round(pace_s * len(self._waiting))))

    def submit(self, prepared: Sequence[Prepared], request_id: str) -> Answer:
        """Hand over the prompts of one caller, all or none. request_id: unique; prompts get it with their number.

        Raises RequestError: what an engine cannot serve, or QueueFullError.
        """
        processor = self.processor
        names = [f"{request_id}-{i}" for i in range(len(prepared))]
        for i, one in enumerate(prepared):
            processor.check(one, request_id if len(prepared) == 1 else f"{request_id}, prompt[{i}]")
        if len(prepared) > self._max_queue:
            raise InvalidRequestError(
                f"{len(prepared)} prompts in one request, and at most {self._max_queue} requests may wait at all ([server] max_queue); send fewer",
                param="prompt",
            )
        if len(self._waiting) + len(prepared) > self._max_queue:
            raise QueueFullError(
                f"{len(self._waiting)} requests wait already and {len(prepared)} would join them ([server] max_queue = {self._max_queue}); "
                "try again later"
            )
        try:
            for one, name in zip(prepared, names, strict=True):
                processor.enqueue(one, name)
        except BaseException:
            for name in names:
                processor.abort(name)  # fine for those that never came so far
            raise
        for one, name in zip(prepared, names, strict=True):
            self._waiting[name] = None
            self._watcher.submitted(replace(one.request, request_id=name))
        answer = Answer(names, [processor.output(name) for name in names])
        self._answers |= dict.fromkeys(names, answer)
        return answer

    def abort(self, answer: Answer) -> None:
        """Drop what is unfinished of an answer; its sequences end with "abort"."""
        for name in answer.request_ids:
            if self._answers.pop(name, None) is None:
                continue
            self._waiting.pop(name, None)
            assert self._processor is not None
            output = self._processor.abort(name)
            if output is not None:
                self._watcher.finished(output, time.monotonic())
        answer.wake()

    def abort_all(self, error: XllmError) -> None:
        """End every answer with an error: nobody waits for what will not come."""
        for answer in set(self._answers.values()):
            answer.error = answer.error or error
            self.abort(answer)

    def close(self) -> None:
        """Stop the engines. Blocks for some seconds at most."""
        if self._ping_task is not None:
            self._ping_task.cancel()
        for engine, sock in zip(self.engines, self._sockets, strict=True):
            engine.close()
            sock.close()

    # ---- what engines say ------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        now_s = time.monotonic()
        for i, engine in enumerate(self.engines):
            self._watcher.engine_stats(i, engine.stats)
            for name, admitted_s in engine.admitted:
                self._waiting.pop(name, None)
                self._watcher.admitted(name, admitted_s)
            for name in engine.preempted:
                self._watcher.preempted(name)
            for name, error in engine.refused:
                self._refuse(name, error)
            engine.admitted, engine.preempted, engine.refused = [], [], []
        outputs = self._pool.poll()
        if self._processor is None or not outputs:
            return
        self._watcher.tokens(outputs, now_s)
        for output in self._processor.feed(outputs):
            answer = self._answers.get(output.request_id)
            if answer is None:
                continue
            if output.finished:
                del self._answers[output.request_id]
                self._waiting.pop(output.request_id, None)
                self._finish_times = [*self._finish_times[-31:], now_s]
                self._watcher.finished(output, now_s)
            answer.wake()

    def _refuse(self, name: str, error: XllmError) -> None:
        answer = self._answers.get(name)
        if answer is not None:
            answer.error = error
            self.abort(answer)

    def _die(self, error: EngineDeadError) -> None:
        if self.failure is None:
            self.failure = error
            self.abort_all(error)
            self.death.set()

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(_PING_S)
            for engine in self.engines:
                engine.ping()


def open_text(text: TextFiles, chat_template: str | None) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """Tokenizer and template from what the engine found. chat_template: source that replaces the model's own."""
    from xllm_core.frontend.template import ChatTemplate
    from xllm_core.frontend.tokenizer import Tokenizer

    source = chat_template if chat_template is not None else text.chat_template
    files = TokenizerFiles(
        tokenizer_json=Path(text.tokenizer_json) if text.tokenizer_json is not None else None, convert=None, chat_template=source,
        eos_token_ids=tuple(text.eos_token_ids), bos_token=text.bos_token, eos_token=text.eos_token, adds_bos=text.adds_bos,
    )  # fmt: skip
    tokenizer = Tokenizer(files) if text.tokenizer_json is not None else None
    if tokenizer is None or source is None:
        return tokenizer, None
    return tokenizer, ChatTemplate(source, {"bos_token": text.bos_token or "", "eos_token": text.eos_token or ""})
