"""A real mooncake_master on loopback for each test that wants one, engines in processes of their own, and a tiny random Llama."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xllm_mooncake.here import check

from .real_master import SMALL, Master, wait_for


@pytest.fixture(autouse=True)
def has_mooncake() -> None:
    """Without wheel or library the test is skipped with the command that helps; under CI=true it fails."""
    if reason := check():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def master() -> Iterator[Master]:
    """A running one."""
    one = Master()
    yield one
    one.kill()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two layers of random weights in float32, spread so far that a wrong block changes tokens."""
    from xllm_core.testing.tiny import tiny_config, write_tiny

    config = tiny_config("LlamaForCausalLM", max_position_embeddings=1024, initializer_range=0.5)
    return str(write_tiny(config, tmp_path_factory.mktemp("models") / "tiny"))


class EngineProcess:
    """`engine_process.py` in a process of its own; asked by JSON lines."""

    def __init__(self, model: str, master: Master | None, **settings: Any) -> None:
        table = {**SMALL, "master": master.address, **settings} if master is not None else None
        command = [sys.executable, str(Path(__file__).with_name("engine_process.py")), model, json.dumps(table)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.stderr: list[str] = []
        threading.Thread(target=self._hear, daemon=True).start()
        self._buffer = b""
        self.ready = self._answer()

    def ask(self, **request: Any) -> Any:
        """One request, one answer."""
        self.send(**request)
        return self._answer()

    def send(self, **request: Any) -> None:
        """A request whose answer is taken later."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def generate(self, *prompts: list[int], max_tokens: int = 8) -> dict[str, Any]:
        """tokens per prompt, and how long after its submission the first token of each came, by the engine's clock."""
        found: dict[str, Any] = self.ask(do="generate", prompts=list(prompts), max_tokens=max_tokens)
        return found

    def stats(self) -> dict[str, Any]:
        """The store's counters, and what the KV manager loaded: store_tokens."""
        found: dict[str, Any] = self.ask(do="stats")
        return found

    def end(self) -> None:
        """Tell it to end, as a user would."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                self.send(do="close")

    def close(self) -> None:
        """Wait until it has ended; if it does not, by force."""
        self.end()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait()

    def _answer(self, timeout_s: float = 60.0) -> Any:
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            wait_s = max(0.0, deadline_s - time.monotonic())
            assert select.select([self.process.stdout], [], [], wait_s)[0], f"no answer: {self.stderr[-20:]}"
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            assert piece, f"the engine process has ended: {self.stderr[-20:]}"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _hear(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            self.stderr += (line.decode(errors="replace").rstrip() for line in iter(lines.readline, b""))


@pytest.fixture
def engine(model: str) -> Iterator[Callable[..., EngineProcess]]:
    """engine(master, **settings of [plugin.mooncake]); without a master an engine without a store."""
    yield from _starting(model)


def _starting(model: str) -> Iterator[Callable[..., EngineProcess]]:
    made: list[EngineProcess] = []

    def start(master: Master | None = None, **settings: Any) -> EngineProcess:
        made.append(EngineProcess(model, master, **settings))
        return made[-1]

    yield start
    for one in made:
        one.end()
    for one in made:
        one.close()


@pytest.fixture(scope="session")
def _together(model: str) -> Iterator[tuple[Master, EngineProcess, EngineProcess, EngineProcess]]:
    if reason := check():  # before the fixture that skips
        pytest.skip(reason)
    master, start = Master(), _starting(model)
    engine = next(start)
    try:
        yield master, engine(master), engine(master), engine()
    finally:  # also when an engine does not start: a master outlives the tests otherwise
        next(start, None)
        master.kill()


@dataclass
class Pair:
    """Two engines that share a master, and one without a store. What one test stored is not in the way of the next: prompts differ."""

    master: Master
    first: EngineProcess
    second: EngineProcess
    plain: EngineProcess
    prompts: list[list[int]]
    expected: list[list[int]]
    before: dict[str, Any]

    def delta(self) -> dict[str, Any]:
        """What the counters of `second` have gained since the test began; breaker_is_open as it is."""
        now = self.second.stats()
        return {name: now[name] - self.before[name] for name in self.before if name != "client_pid"} | {
            "breaker_is_open": now["breaker_is_open"]
        }

    def renew(self) -> None:
        """Other prompts, and counters from now on."""
        self.prompts = make_prompts()
        self.expected = self.plain.generate(*self.prompts)["tokens"]
        self.before = self.second.stats()

    def store(self) -> None:
        """`first` computes the prompts, and its blocks arrive in the store."""
        before = self.first.stats()["stored_blocks"]

        def is_stored() -> bool:
            """Of a master that was restarted a moment ago the first blocks are refused; they are offered again."""
            assert self.first.generate(*self.prompts)["tokens"] == self.expected
            self.first.ask(do="settle")
            return self.first.stats()["stored_blocks"] >= before + NUM_BLOCKS

        wait_for(is_stored, "blocks in the store")


NUM_BLOCKS = 10
"""Of 16 tokens, which the prompts of a test share."""

_prefixes = itertools.count(1)


def make_prompts() -> list[list[int]]:
    """Three that begin alike, and unlike those of any other test."""
    draw = random.Random(next(_prefixes))
    prefix = [draw.randrange(3, 125) for _ in range(16 * NUM_BLOCKS)]
    return [[*prefix, *([11 + i] * (3 + 5 * i))] for i in range(3)]


@pytest.fixture
def pair(_together: tuple[Master, EngineProcess, EngineProcess, EngineProcess]) -> Iterator[Pair]:
    """Both engines well, and the prompts of this test."""
    master, first, second, plain = _together
    prompts = make_prompts()
    yield Pair(master, first, second, plain, prompts, plain.generate(*prompts)["tokens"], second.stats())
    master.resume()
    if master.process is None or master.process.poll() is not None:
        master.restart()
    for one in (first, second):
        wait_for(lambda one=one: not one.stats()["breaker_is_open"], "closed breaker")
