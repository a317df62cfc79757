"""A real `xllm serve` for tests, and a plain client that hides nothing: statuses, headers, events as they came."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
START_S = 120.0
JSON = {"Content-Type": "application/json"}


@dataclass
class Answer:
    """One response. events: data of each server-sent event, "[DONE]" as text; json: the body where it is one object."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        found = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [one if one == "[DONE]" else json.loads(one) for one in found]

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


@dataclass
class Server:
    """A server process of ours. log: what it wrote to stderr."""

    process: subprocess.Popen[bytes]
    log_path: Path
    host: str = "127.0.0.1"
    port: int = 0
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def engine_pids(self) -> list[int]:
        match = re.search(r"engine pid ([\d, ]+)\)", self.log)
        assert match, self.log
        return [int(pid) for pid in match[1].split(",")]

    def request(
        self, method: str, path: str, body: Any = None, *, headers: dict[str, str] | None = None, timeout: float = 60.0
    ) -> Answer:
        """body: an object is sent as JSON, bytes as they are."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            sent = {**(JSON if body is not None else {}), **self.headers, **(headers or {})}
            connection.request(method, path, raw, sent)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **options: Any) -> Answer:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> Answer:
        return self.request("POST", path, body, **options)

    def metrics(self) -> dict[str, float]:
        """Series of /metrics: name with its labels -> value."""
        lines = self.get("/metrics").body.decode().splitlines()
        return {k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if line and line[0] != "#")}

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series of a name that carry these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            value for series, value in self.metrics().items()
            if series.partition("{")[0] == name and all(one in series for one in wanted)
        )  # fmt: skip

    def wait_idle(self, timeout: float = 20.0) -> dict[str, Any]:
        """Until nothing is unfinished and no block is used; the /load of then."""
        deadline = time.monotonic() + timeout
        while True:
            load = self.get("/load").json
            if load["server_load"] == load["num_sequences_running"] == load["used_blocks"] == 0:
                return load
            assert time.monotonic() < deadline, f"not idle after {timeout} s: {load}"
            time.sleep(0.02)

    def connect(self, timeout: float = 30.0) -> socket.socket:
        """A bare connection."""
        return socket.create_connection((self.host, self.port), timeout=timeout)

    def wait_ready(self, timeout: float = START_S) -> None:
        """Until requests are served."""
        self._wait("/health", timeout)

    def wait_listening(self, timeout: float = START_S) -> None:
        """Until connections are taken; the engine may still be starting."""
        self._wait("/health/live", timeout)

    def _wait(self, path: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log}"
            match = re.search(r"starts at http://[^:]+:(\d+)", self.log)
            if match:
                self.port = int(match[1])
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if self.get(path, timeout=5).status == 200:
                        return
            assert time.monotonic() < deadline, f"{path} is not 200 after {timeout} s:\n{self.log}"
            time.sleep(0.02)

    def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM, and its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@contextlib.contextmanager
def serving(
    model: str, log_path: Path, *flags: str, wait: bool = True, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """`xllm serve MODEL --port 0 FLAGS` until the block ends; nothing of it is left afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    command = [sys.executable, "-m", "xllm_core.cli", "serve", model, "--port", "0", *flags]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=log_path.parent
        )
    server = Server(process, log_path)
    try:
        if wait:
            server.wait_ready()
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_running(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
