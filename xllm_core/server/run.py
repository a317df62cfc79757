"""`xllm serve`: one API process, its engine processes, their start, their end.

Exit status: 0 after a drain, 1 when the start failed, 70 when an engine died while serving: a supervisor starts us again.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xllm_core import __version__
from xllm_core.config import Settings
from xllm_core.config_tables import ServerTable
from xllm_core.engine.info import EngineInfo
from xllm_core.engine.messages import Loading, Phase
from xllm_core.errors import ConfigError, HttpRefusal
from xllm_core.frontend.serving import Serving

if TYPE_CHECKING:
    from tqdm import tqdm

    from xllm_core.server.app import ServerState
    from xllm_core.server.guard import Guard
    from xllm_core.server.metrics import Metrics

ENGINE_DIED = 70
_BACKLOG = 2048
_FLUSH_S = 1.0  # for error chunks of streams that were cut
_SHOW_ABOVE_BYTES = 1 << 30


def serve(settings: Settings) -> int:
    """Serve until a signal or the engine's end; returns the exit status. Raises XllmError where the start fails."""
    return asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    started_s = time.perf_counter()
    table = settings.server
    names, keys = model_names(settings), read_keys(table)
    with _listener(table) as (sock, url), start_engines(settings, names) as (serving, metrics, report):
        pids = ", ".join(str(engine.pid) for engine in serving.engines)
        report.line(f"xllm {__version__} starts at {url} (pid {os.getpid()}, engine pid {pids})")
        return await _Life(serving, metrics, table, names, keys, sock, report).run(url, started_s)


@contextlib.contextmanager
def start_engines(
    settings: Settings, names: tuple[str, ...], max_queue: int | None = None
) -> Iterator[tuple[Serving, Metrics, Report]]:
    """Engine processes of these settings, starting; they end with the block. `await serving.start()` waits for them.

    max_queue: instead of the setting's.
    """
    table = settings.server
    report = Report(settings.engine.num_engines)
    serving = Serving(
        settings.tables(), num_engines=settings.engine.num_engines, max_queue=max_queue or table.max_queue,
        engine_timeout_s=table.engine_timeout_s, chat_template=_read_template(table), on_start=report.event,
        use_generation_config=table.generation_config == "auto",
    )  # fmt: skip
    try:
        from xllm_core.server.metrics import Metrics  # the engines are starting by now

        metrics = Metrics(names[0], settings.engine.num_engines)
        serving.watch(metrics)
        yield serving, metrics, report
    finally:
        report.close()
        serving.close()


@contextlib.asynccontextmanager
async def local_app(settings: Settings) -> AsyncIterator[Guard]:
    """The application with its engines and without a socket, ready; for callers in this process, who need no key."""
    names = model_names(settings)
    with start_engines(settings, names, max_queue=sys.maxsize) as (serving, metrics, report):
        from xllm_core.server.app import ServerState, create_app
        from xllm_core.server.guard import ApiKeys

        app = create_app(
            ServerState(serving, metrics, settings.server, names, created=int(time.time())),
            ApiKeys(()),
            checks_host=False,
        )
        report.line(f"xllm {__version__} loads {names[0]}")
        await serving.start()
        yield app


class _Life:
    """One server from its first connection to its last."""

    def __init__(
        self, serving: Serving, metrics: Metrics, table: ServerTable, names: tuple[str, ...], keys: tuple[str, ...], sock: socket.socket,
        report: Report,
    ) -> None:  # fmt: skip
        # The engine is starting by now; these imports take as long as its own.
        import uvicorn

        from xllm_core.server.app import ServerState, create_app
        from xllm_core.server.guard import ApiKeys
        from xllm_core.server.protocol import limited

        self._serving, self._metrics, self._table, self._sock, self._report = serving, metrics, table, sock, report
        if table.log_requests:
            logging.getLogger("xllm.access").setLevel(logging.INFO)  # asked for by name, whatever the level of the rest
        self._state: ServerState = ServerState(serving, metrics, table, names, created=int(time.time()))
        is_local = table.uds is None and table.host in ("127.0.0.1", "localhost", "::1")
        protocol = limited(
            header_timeout_s=table.header_timeout_s,
            write_timeout_s=table.write_timeout_s,
            max_header_bytes=table.max_header_bytes,
            max_connections=table.max_connections,
        )
        config = uvicorn.Config(
            create_app(self._state, ApiKeys(keys), checks_host=is_local), http=protocol, ws="none", loop="asyncio", lifespan="off",
            log_config=None, access_log=False, proxy_headers=False, server_header=False, timeout_keep_alive=table.keep_alive_timeout_s,  # type: ignore[arg-type]  # it takes any number
            h11_max_incomplete_event_size=table.max_header_bytes, timeout_graceful_shutdown=2,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()

    async def run(self, url: str, started_s: float) -> int:
        """Until the end; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # signals are ours
        http = asyncio.create_task(self._server.serve(sockets=[self._sock]))
        start = asyncio.create_task(self._serving.start())
        signalled = asyncio.create_task(self._signals.get())
        try:
            await asyncio.wait((start, signalled, http), return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                start.cancel()
                return 128 + signalled.result() if signalled.done() else 1
            self._announce(await start, url, time.perf_counter() - started_s)
            gc.freeze()  # what the start has made stays: collections between two tokens need not look through it
            died = asyncio.create_task(self._serving.death.wait())
            await asyncio.wait((died, signalled, http), return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                self._report.line(f"xllm: {self._serving.failure}; the server ends with status {ENGINE_DIED}")
                await self._finish(_FLUSH_S)
                return ENGINE_DIED
            died.cancel()
            if not signalled.done():
                self._report.line("xllm: the HTTP server ended by itself")
                return 1
            return await self._drain(signalled.result())
        finally:
            await self._stop_http(http)

    def _announce(self, info: EngineInfo, url: str, seconds: float) -> None:
        self._metrics.set_info(info)
        table, line = self._table, self._report.line
        at_once = info.kv_tokens / info.max_model_len
        line(
            f"ready after {seconds:.1f} s: {url}/v1 serves {self._state.model_names[0]} ({info.architecture}, {info.dtype}, {info.device})"
        )
        line(
            f"KV cache: {info.num_blocks} blocks of {info.block_size} tokens, {info.kv_tokens} in all: {at_once:.1f} requests of the full"
            f" context of {info.max_model_len} at once, {info.max_num_seqs} sequences at most"
        )
        if table.host not in ("127.0.0.1", "localhost", "::1") and table.uds is None and not read_keys(table):
            line(f"warning: {table.host} is reachable from outside and no API key is set ([server] api_keys)")

    async def _drain(self, number: signal.Signals) -> int:
        """Let what is under way end, take nothing new; a second signal ends it now."""
        serving, table = self._serving, self._table
        self._state.is_draining = True
        self._metrics.set_draining(True)
        self._report.line(
            f"{signal.Signals(number).name}: {serving.num_unfinished} requests under way have {table.shutdown_timeout_s:g} s to end; "
            "a second signal ends them now"
        )
        asyncio.get_running_loop().call_later(table.drain_delay_s, self._state.take_no_more)
        again = asyncio.create_task(self._signals.get())
        died = asyncio.create_task(serving.death.wait())
        idle = asyncio.create_task(self._until_idle(table.drain_delay_s, table.shutdown_timeout_s))
        await asyncio.wait((again, died, idle), return_when=asyncio.FIRST_COMPLETED)
        why = f"the request did not end in time ([server] shutdown_timeout_s = {table.shutdown_timeout_s:g})"
        if again.done():
            why = "a second signal ended what was under way"
        for task in (again, died, idle):
            task.cancel()
        if serving.num_unfinished:
            text = f"the server is shutting down and {why}"
            serving.abort_all(HttpRefusal(text, status=503, code="shutting_down"))
        await self._finish(_FLUSH_S)
        return ENGINE_DIED if serving.failure is not None else 0

    async def _until_idle(self, delay_s: float, timeout_s: float) -> None:
        await asyncio.sleep(delay_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._serving.num_unfinished:
                    await asyncio.sleep(0.02)

    async def _finish(self, seconds: float) -> None:
        """Time for last chunks to go out."""
        deadline_s = time.monotonic() + seconds
        while self._server.server_state.tasks and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)

    async def _stop_http(self, http: asyncio.Task[None]) -> None:
        self._server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await http


class Report:
    """Lines on stderr: each phase of the start with its seconds. Weights of a size that makes people wait get a bar."""

    def __init__(self, num_engines: int) -> None:
        self._num_engines = num_engines
        self._bar: tqdm[None] | None = None

    def line(self, text: str) -> None:
        """Print; a closed stderr is nobody's problem."""
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)

    def event(self, engine: int, event: Phase | Loading) -> None:
        """What an engine says while it starts."""
        if isinstance(event, Phase):
            who = f"engine {engine}: " if self._num_engines > 1 else ""
            self.line(f"  {who}{event.name:<10} {event.seconds:6.2f} s  {event.detail}")
        elif event.total_bytes >= _SHOW_ABOVE_BYTES and engine == 0:
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(
                    total=event.total_bytes, desc="weights", unit="B", unit_scale=True, disable=None, leave=False
                )
            self._bar.update(event.done_bytes - self._bar.n)
            if event.done_bytes >= event.total_bytes:
                self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def model_names(settings: Settings) -> tuple[str, ...]:
    """Names that clients may use, the shown one first: those of `[server] served_model_name`, else the reference without path and prefix."""
    reference = settings.model.path
    if reference is None:
        raise ConfigError("no model; give one on the command line or as [model] path")
    if settings.server.served_model_name:
        return settings.server.served_model_name
    short = Path(reference).resolve().name if Path(reference).exists() else reference.removeprefix("pkg:")
    return (short, reference) if short != reference else (short,)


def read_keys(table: ServerTable) -> tuple[str, ...]:
    """API keys of the settings and of the key file. Raises ConfigError for a file that cannot be read or holds none."""
    keys = [key.get_secret_value() for key in table.api_keys]
    if table.api_key_file is not None:
        try:
            lines = Path(table.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"[server] api_key_file: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"[server] api_key_file: {table.api_key_file} holds no key; write one per line")
        keys += found
    return tuple(keys)


def _read_template(table: ServerTable) -> str | None:
    if table.chat_template is None:
        return None
    try:
        return Path(table.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"[server] chat_template: {error}") from error


@contextlib.contextmanager
def _listener(table: ServerTable) -> Iterator[tuple[socket.socket, str]]:
    """The socket that listens, and its URL. Bound before the engine starts, so that a port in use is known at once."""
    if table.uds is not None:
        yield from _unix_listener(Path(table.uds))
        return
    family = socket.AF_INET6 if ":" in table.host else socket.AF_INET
    # With its protocol named, or asyncio does not see that it is TCP's and leaves Nagle's algorithm on: every answer would then wait 40 ms for the
    # client's system to acknowledge its head.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((table.host, table.port))
        sock.listen(_BACKLOG)  # at once: until one listens, a second server could bind the same port
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {table.host} port {table.port}: {error.strerror or error}; choose another with --port (0 takes a free one) or --host"
        ) from error
    port = sock.getsockname()[1]
    host = f"[{table.host}]" if family == socket.AF_INET6 else table.host
    try:
        yield sock, f"http://{host}:{port}"
    finally:
        sock.close()


def _unix_listener(path: Path) -> Iterator[tuple[socket.socket, str]]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        mask = os.umask(0o177)  # for this user alone
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {path}: {error.strerror or error}; choose another path with --uds"
        ) from error
    try:
        yield sock, f"http+unix://{path}"
    finally:
        sock.close()
        path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """A socket file that nobody listens on is left over from a server that was killed."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise FileExistsError(0, "a file that is no socket is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise FileExistsError(0, "another server listens there")
