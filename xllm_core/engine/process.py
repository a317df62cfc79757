"""The engine process of `xllm serve`: builds the engine that its parent's settings describe, then turns messages into steps.

    python -m xllm_core.engine.process SOCKET_FD DEATH_FD PARENT_PID

It ends when its parent says so or dies: the death pipe is watched by a thread, and on Linux the kernel kills it as well. Terminal signals
are the parent's business.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from xllm_core.config import Settings
from xllm_core.engine import messages
from xllm_core.engine.engine import Engine
from xllm_core.engine.gathering import patience_s
from xllm_core.engine.info import EngineInfo, engine_info
from xllm_core.engine.messages import Frames, FromEngine, ToEngine, encode, to_engine
from xllm_core.engine.scheduler import SchedulerEvents
from xllm_core.errors import RequestError, XllmError
from xllm_core.plugins.manager import PluginManager
from xllm_core.plugins.resolve import Assembly, assemble
from xllm_core.plugins.worker import assembly_of, load_plan
from xllm_core.types import EngineRequest, SamplingParams

if TYPE_CHECKING:
    from xllm_core.engine.build import BuiltEngine
    from xllm_core.plugins.contracts.kv import KVStore
    from xllm_core.plugins.contracts.weights import TokenizerFiles
    from xllm_core.runtime.graphs import GraphStats

_log = logging.getLogger("xllm.engine")

_PR_SET_PDEATHSIG = 1
_READ_BYTES = 1 << 18
_SETTLE_S = 0.002  # how often an idle engine looks after KV transfers that are still under way
_STORE_STATS_S = 1.0  # how often a KV store is asked what it has counted
_LOADING_EVERY_S = 0.2


class Channel:
    """Messages over the socket to the parent. Owned by the engine's thread; others may send. Raises EOFError when the parent is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = Frames()
        self._sending = threading.Lock()

    def send(self, message: FromEngine) -> None:
        """Write one message; waits while the parent does not read."""
        try:
            with self._sending:
                self._sock.sendall(encode(message))
        except OSError as error:
            raise EOFError from error

    def receive(self, wait_s: float | None) -> list[ToEngine]:
        """Messages that are there. wait_s: how long to wait for the first; None for ever, 0 not at all."""
        if wait_s != 0 and not select.select([self._sock], [], [], wait_s)[0]:
            return []
        try:
            data = self._sock.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        return [to_engine.decode(body) for body in self._frames.feed(data)]


class EngineLoop:
    """One engine, driven by its parent's messages. `run` returns when the parent says stop. store, graphs: whose counters are told too."""

    def __init__(self, engine: Engine, channel: Channel, store: KVStore | None, graphs: GraphStats | None) -> None:
        self._engine = engine
        self._channel = channel
        self._store = _StoreCounters(store) if store is not None else None
        kv = engine.scheduler.kv.stats()  # what the warm-up counted is nobody's business
        self._base_query_tokens, self._base_hit_tokens = kv.query_tokens, kv.hit_tokens
        self._base_replays = engine.num_replays
        self._graphs = graphs
        self._base_preemptions = engine.scheduler.stats.num_preemptions
        self._told: messages.EngineStats | None = None
        self._is_stopping = False
        self._is_tidy = False
        engine.scheduler.events = SchedulerEvents()

    def run(self, taken: list[ToEngine]) -> None:
        """Take messages, make a step, send what came of it; sleep where there is nothing to do. taken: what came before."""
        engine = self._engine
        self._tell_stats()
        while True:
            was_idle = not engine.has_work
            for message in taken or self._channel.receive(self._patience_s()):
                self._take(message)
            taken = []
            if was_idle and engine.has_work:
                self._gather()
            if self._is_stopping:
                return
            if engine.has_work or engine.scheduler.kv.stats().held_blocks:
                self._step()
            else:
                self._tell_stats()

    def _gather(self) -> None:
        """Take what else arrives while it is worth waiting for."""
        deadline_s = time.monotonic() + patience_s(self._engine)
        while not self._is_stopping and (left_s := deadline_s - time.monotonic()) > 0:
            for message in self._channel.receive(left_s):
                self._take(message)

    def _patience_s(self) -> float | None:
        if self._engine.has_work:
            return 0
        if self._engine.scheduler.kv.stats().held_blocks:
            return _SETTLE_S
        return _STORE_STATS_S if self._store is not None else None  # a store goes on counting by itself

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, messages.Submit):
            try:
                self._engine.submit(message.request)
            except RequestError as error:
                param = getattr(error, "param", None)
                self._channel.send(
                    messages.Refused(message.request.request_id, type(error).__name__, str(error), param)
                )
        elif isinstance(message, messages.Abort):
            self._engine.abort(message.request_id, message.index)
        elif isinstance(message, messages.Ping):
            self._channel.send(messages.Pong(self._stats()))
            if not self._is_tidy and not self._engine.has_work:
                self._is_tidy = True
                _give_back_memory()
        elif isinstance(message, messages.Stop):
            self._is_stopping = True

    def _step(self) -> None:
        outputs = self._engine.step()
        events, stats = self._engine.scheduler.events, self._stats()
        assert events is not None
        if outputs or events.admitted or events.preempted or stats != self._told:
            self._channel.send(messages.Stepped(outputs, stats, events.admitted, events.preempted))
            self._told = stats
            self._engine.scheduler.events = SchedulerEvents()

    def _tell_stats(self) -> None:
        stats = self._stats()
        if stats != self._told:
            self._channel.send(messages.Pong(stats))
            self._told = stats

    def _stats(self) -> messages.EngineStats:
        scheduler = self._engine.scheduler
        kv = scheduler.kv.stats()
        stats = messages.EngineStats(
            num_running=len(scheduler.running), num_waiting=len(scheduler.waiting), num_waiting_for_kv=len(scheduler.parked),
            used_blocks=kv.used_blocks + kv.held_blocks, total_blocks=kv.total_blocks,
            num_preemptions=scheduler.stats.num_preemptions - self._base_preemptions,
            query_tokens=kv.query_tokens - self._base_query_tokens, hit_tokens=kv.hit_tokens - self._base_hit_tokens,
            num_replays=self._engine.num_replays - self._base_replays,
            store=self._store.read() if self._store is not None else {},
        )  # fmt: skip
        if (graphs := self._graphs) is not None:  # the worker's own numbers, perhaps of a step that is under way
            stats.num_captures, stats.num_eager = graphs.num_captures, graphs.num_eager
            stats.padded_rows, stats.arena_bytes = graphs.padded_rows, graphs.arena_bytes
        return stats


class _StoreCounters:
    """What a KV store counts, read once in a while: it may stand behind a lock, and steps must not wait. One that raises is asked no more."""

    def __init__(self, store: KVStore) -> None:
        self._store: KVStore | None = store
        self._counters: dict[str, int] = {}
        self._due_s = 0.0

    def read(self) -> dict[str, int]:
        """As of a second ago at most."""
        now_s = time.monotonic()
        if self._store is None or now_s < self._due_s:
            return self._counters
        self._due_s = now_s + _STORE_STATS_S
        try:
            self._counters = {str(name): int(count) for name, count in self._store.stats().items()}
        except Exception:  # noqa: BLE001  a store that cannot count still holds blocks
            _log.exception("the KV store's counters cannot be read, and are left out from now on")
            self._store, self._counters = None, {}
        return self._counters


def build(settings: Settings, channel: Channel, planned: messages.Planned | None) -> tuple[BuiltEngine, EngineInfo]:
    """Find, load and connect everything; tells the parent of each phase that has ended. planned: what another process has decided already."""
    gc.disable()  # what is made now stays: to look through it again and again takes a tenth of the start
    try:
        return _build(settings, channel, planned)
    finally:
        gc.freeze()
        gc.enable()


def _give_back_memory() -> None:
    """What the start used and nobody needs, once, when there is time: frames keep what was opened on the way, the model's file with it."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what is freed, unless it is told
    if trim is not None:
        trim(0)


def _build(settings: Settings, channel: Channel, planned: messages.Planned | None) -> tuple[BuiltEngine, EngineInfo]:
    from xllm_core.engine.build import build_engine, call_in, load_model, worker_thread

    clock = _Phases(channel)
    assembly = (
        _decide(settings, channel, clock) if planned is None else assembly_of(load_plan(planned.plan, planned.hash))
    )
    clock.end("model", f"{assembly.plan.architecture}, {assembly.plan.dtype}")
    with ThreadPoolExecutor(1, thread_name_prefix="xllm-tokenizer") as pool:
        text = pool.submit(_tell_text, assembly, channel)  # a first conversion takes seconds, as loading weights does
        thread = worker_thread(settings)
        loaded = call_in(thread, partial(load_model, assembly, settings, progress=clock.loading))
        clock.end("weights", loaded.device.facts().name)
        built = build_engine(assembly, settings, loaded=loaded, thread=thread)
        info = engine_info(assembly, built)
        clock.end("KV cache", f"{info.num_blocks} blocks of {info.block_size} tokens")
        _warm_up(built.engine, info)
        clock.end("warm-up", "two requests of two tokens")
        name = text.result()
    clock.end("tokenizer", name)
    return built, info


def _decide(settings: Settings, channel: Channel, clock: _Phases) -> Assembly:
    """Find plugins, choose, and tell the parent what was chosen, for the engines beside this one."""
    manager = PluginManager.discover(settings).load()
    clock.end("plugins", ", ".join(sorted(record.id for record in manager.records if record.state == "loaded")))
    assembly = assemble(settings, manager)
    channel.send(messages.Planned(assembly.plan.to_json(), assembly.plan.hash))
    return assembly


class _Phases:
    """What has ended, and how long it took."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._started_s = time.perf_counter()
        self._told_s = 0.0

    def end(self, name: str, detail: str) -> None:
        now_s = time.perf_counter()
        self._channel.send(messages.Phase(name, now_s - self._started_s, detail))
        self._started_s = now_s

    def loading(self, name: str, done: int, total: int) -> None:
        """Progress of the weights, a few times a second."""
        now_s = time.perf_counter()
        if now_s - self._told_s > _LOADING_EVERY_S or done >= total:
            self._told_s = now_s
            self._channel.send(messages.Loading(done, total))


def _tell_text(assembly: Assembly, channel: Channel) -> str:
    """Let the parent open the tokenizer while weights are read; returns the name of its file."""
    files: TokenizerFiles = assembly.checkpoint.tokenizer()
    path = files.tokenizer_json if files.tokenizer_json is not None else files.convert() if files.convert else None
    text = messages.TextFiles(
        tokenizer_json=str(path) if path is not None else None, bos_token=files.bos_token, eos_token=files.eos_token,
        eos_token_ids=list(files.eos_token_ids), adds_bos=files.adds_bos, chat_template=files.chat_template,
        generation_config=dict(assembly.checkpoint.generation_config), warnings=list(files.extra.get("warnings", ())),
    )  # fmt: skip
    channel.send(text)
    return path.name if path is not None else "none"


def _warm_up(engine: Engine, info: EngineInfo) -> None:
    """A prompt and a decode, alone and sampled: what is made at first use is made now, and what cannot run fails the start, not a user."""
    room = min(info.max_model_len, info.capacity_tokens)
    params = SamplingParams(max_tokens=min(2, room), temperature=0.0, ignore_eos=True)
    engine.submit(EngineRequest("warm-up-0", (0,), params, seed=0))
    engine.submit(EngineRequest("warm-up-1", (0,), replace(params, temperature=1.0, top_p=0.9, top_k=8), seed=0))
    while engine.has_work:
        engine.step()
    engine.scheduler.kv.reset_prefix_cache()


def _die_with_parent(death_fd: int, parent_pid: int) -> None:
    """End this process at once when its parent is gone, whatever the engine's thread is doing."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(death_fd, 1)  # returns when the last writer, which is the parent, has gone
        os._exit(0)

    threading.Thread(target=watch, name="xllm-death-watch", daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def main(arguments: list[str]) -> int:
    """Serve one parent; returns the exit status: 0 when told to stop or the parent is gone, 1 after a failure that was reported."""
    sock_fd, death_fd, parent_pid = (int(argument) for argument in arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # a supervisor may signal the whole group; the parent drains, then says stop
    _die_with_parent(death_fd, parent_pid)
    channel = Channel(socket.socket(fileno=sock_fd))
    engine: Engine | None = None
    try:
        start, *early = channel.receive(None)
        if not isinstance(start, messages.Start):
            raise RuntimeError(f"the first message was {type(start).__name__}, not Start")
        settings = Settings.from_tables(start.tables)
        built, info = build(settings, channel, start.planned)
        engine = built.engine
        channel.send(messages.Ready(info))
        EngineLoop(engine, channel, built.store, built.worker.graph_stats()).run(early)
    except EOFError:
        return 0
    except BaseException as error:  # noqa: BLE001  whatever it was, the parent must hear of it, and this process ends
        return _report(channel, error)
    engine.close()
    return 0


def _report(channel: Channel, error: BaseException) -> int:
    is_ours = isinstance(error, XllmError)
    if not is_ours:
        sys.excepthook(type(error), error, error.__traceback__)
    with contextlib.suppress(EOFError):
        channel.send(messages.Failed(type(error).__name__, str(error), is_ours))
    return 1


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of libraries must not keep a finished engine alive
