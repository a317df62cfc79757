"""Starting an engine and asking it: over HTTP with the client of `xllm bench serve`, or by lines to a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.peers.engines import Engine, Places
from benchmarks.peers.installs import AbsentError
from benchmarks.peers.processes import Guard, Running, free_port
from benchmarks.peers.workloads import Answer, Shape
from xllm_core.loadgen.client import LoadClient, Target
from xllm_core.loadgen.runner import Run, run_load
from xllm_core.loadgen.workload import Ask, Prompts

START_LIMIT_S = 900.0
"""vLLM compiles the model when it starts; on two busy cores that takes minutes."""

_POLL_S = 0.01
_ONE = Shape(1, 16, 1)


class EngineSession:
    """One engine that runs. started_with: its command and what was set in its environment, for the record."""

    def __init__(self, engine: Engine, places: Places, guard: Guard, logs: Path) -> None:
        self.engine = engine
        is_http = engine.over == "http"
        places = Places(places.homes, places.models, free_port() if is_http else 0)
        command, env = engine.command(places), engine.env(places)
        self.started_with = {"command": command, "env": env}
        self._running = Running(command, logs / f"{engine.name}.log", guard, env=env, has_pipes=not is_http)
        self._url = f"http://127.0.0.1:{places.port}" if is_http else ""

    def wait_first_token(self) -> float:
        """Seconds from the process's start. Raises AbsentError if it ends or takes too long."""
        if self._url:
            while not self._is_healthy():
                self._check()
                time.sleep(_POLL_S)
            self._first_chunk()
        else:
            self.play(_ONE, seed=1_000_000_007)
        return time.perf_counter() - self._running.started_s

    @property
    def pid(self) -> int:
        """The process that leads."""
        return self._running.pid

    def pause(self) -> None:
        """It sleeps until `resume`, whatever its threads were waiting for."""
        self._running.pause()

    def resume(self) -> None:
        """Its turn."""
        self._running.resume()

    def play(self, shape: Shape, seed: int, prefix_seed: int = 0) -> Answer:
        """As `workloads.Session` says."""
        if self._url:
            return asyncio.run(self._play_http(shape, seed, prefix_seed))
        return self._play_process(shape, seed, prefix_seed)

    def stop(self) -> None:
        """End it and what it started."""
        self._running.stop()

    async def _play_http(self, shape: Shape, seed: int, prefix_seed: int) -> Answer:
        # Prompts follow from their seed and the request's index: under a common prefix only the index may differ.
        prefix = ((0, shape.prefix_len),) if shape.prefix_len else ()
        prompts, first = (Prompts(prefix_seed, 1000, 40_000), seed) if prefix else (Prompts(seed, 1000, 40_000), 0)
        asks = [Ask(first + i, shape.input_len, shape.output_len, prefix=prefix) for i in range(shape.num_requests)]
        # A connection per request, for all: llama-server closes one that it has kept for a while, in the face of the next request.
        headers, extra = {"Connection": "close"}, {"ignore_eos": True}
        target = Target(url=self._url, model="model", headers=headers, extra=extra)
        async with LoadClient(target) as client:
            clients = shape.num_clients or shape.num_requests
            run = await run_load(client, asks, prompts, num_clients=clients, show=False)
        return self._answer(run, shape)

    def _answer(self, run: Run, shape: Shape) -> Answer:
        if run.is_interrupted:  # the client has taken Ctrl-C for a wish to keep what there is
            raise KeyboardInterrupt
        for sample in run.samples:
            if sample.outcome != "ok" or sample.output_tokens != shape.output_len:
                got = sample.message or f"{sample.output_tokens} new tokens instead of {shape.output_len}"
                raise AbsentError(f"a request failed: {got}; its log says: {self._running.tail()}")
        # A token whose text is held back, half of a character, has no chunk: then the end of the answer counts.
        first_s = [sample.chunk_s[0] if sample.chunk_s else sample.end_s or 0.0 for sample in run.samples]
        elapsed_s = run.duration_s
        if shape.num_requests == 1 and (chunks := run.samples[0].chunk_s):
            elapsed_s = chunks[-1]
        return Answer(elapsed_s, first_s, [gap for sample in run.samples for gap in sample.gaps_s])

    def _play_process(self, shape: Shape, seed: int, prefix_seed: int) -> Answer:
        pipes = self._running.process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        load = {
            "num_prompts": shape.num_requests, "seed": seed, "input_len": shape.input_len, "output_len": shape.output_len,
            "prefix_len": shape.prefix_len, "prefix_seed": prefix_seed,
        }  # fmt: skip
        with contextlib.suppress(BrokenPipeError):
            pipes.stdin.write(json.dumps(load) + "\n")
            pipes.stdin.flush()
        if not (line := pipes.stdout.readline()):
            raise AbsentError(f"its process ended with status {pipes.wait()}: {self._running.tail()}")
        told: dict[str, Any] = json.loads(line)
        elapsed_s = shape.num_requests * shape.output_len / told["tok_s"]
        return Answer(elapsed_s, [value / 1e3 for value in told["ttft_ms"]])

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self._url + self.engine.health, timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _first_chunk(self) -> None:
        body = json.dumps(
            {"model": "model", "prompt": list(range(1000, 1016)), "max_tokens": 4, "stream": True}
        ).encode()
        request = urllib.request.Request(f"{self._url}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=START_LIMIT_S) as response:
                response.read(1)
        except (urllib.error.URLError, OSError) as error:
            raise AbsentError(f"its first request failed: {error}; its log says: {self._running.tail()}") from error

    def _check(self) -> None:
        status = self._running.process.poll()
        if status is not None:
            raise AbsentError(f"it ended with status {status} before it was ready: {self._running.tail()}")
        if time.perf_counter() - self._running.started_s > START_LIMIT_S:
            raise AbsentError(f"it was not ready after {START_LIMIT_S:g} s: {self._running.tail()}")
