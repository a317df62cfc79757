"""Two processes, and every way in which one of them can go: nobody waits for what will not come, and nothing is left behind."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.tiny_models import make_tiny
from tests.server.conftest import FLAGS as COMMON
from tests.server.conftest import add_tokenizer
from tests.server.rig import JSON, Server, is_running, serving

pytestmark = pytest.mark.slow

FLAGS = (*COMMON, "--num-blocks", "8192")
LONG = {"prompt": "abc", "max_tokens": 30_000, "temperature": 0, "ignore_eos": True}
NOTICED_S = 2.0
GONE_S = 5.0


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a context so long that a request outlasts every test."""
    path = make_tiny(
        "llama", tmp_path_factory.mktemp("models") / "long", vocab_size=264, bos_token_id=0, eos_token_id=1, max_position_embeddings=32_768
    )  # fmt: skip
    add_tokenizer(path)
    return str(path)


@pytest.fixture
def server(long_model: str, tmp_path: Path) -> Iterator[Server]:
    """A server that a test may kill."""
    with serving(long_model, tmp_path / "log.txt", *FLAGS, "--engine-timeout-s", "2") as running:
        yield running


class Client(threading.Thread):
    """One request on a thread. body: what came until the connection ended; ended_s: when that was; error: what the socket said."""

    def __init__(self, server: Server, body: dict[str, object]) -> None:
        super().__init__(daemon=True)
        self._server, self._request = server, body
        self.status = 0
        self.body = b""
        self.ended_s = 0.0
        self.error: Exception | None = None
        self.has_begun = threading.Event()
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)
        try:
            connection.request("POST", "/v1/completions", json.dumps(self._request), JSON)
            if not self._request.get("stream"):
                self.has_begun.set()
            response = connection.getresponse()
            self.status = response.status
            while piece := response.read1(65536):
                self.body += piece
                self.has_begun.set()
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        finally:
            self.ended_s = time.monotonic()
            self.has_begun.set()
            connection.close()


def under_way(server: Server) -> list[Client]:
    """Two streams and one whole answer, all of them begun in the engine."""
    clients = [Client(server, {**LONG, "stream": True}), Client(server, {**LONG, "stream": True}), Client(server, LONG)]
    for client in clients:
        assert client.has_begun.wait(30)
    deadline = time.monotonic() + 30
    while server.get("/load").json["num_sequences_running"] < len(clients):
        assert time.monotonic() < deadline
    return clients


def wait_gone(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still there after {seconds} s: {alive}"
        time.sleep(0.02)


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()


def test_the_api_process_has_no_torch(server: Server) -> None:
    """It answers in a second and stays small; the engine has it."""
    maps = {pid: Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, server.engine_pids[0])}
    assert "libtorch" not in maps[server.process.pid] and "libtorch" in maps[server.engine_pids[0]]


def test_engine_killed_while_serving(server: Server) -> None:
    """Streams end with an error chunk and [DONE], a whole answer with 503; the server exits non-zero and leaves nothing."""
    before = shared_memory()
    clients = under_way(server)
    killed_s = time.monotonic()
    os.kill(server.engine_pids[0], signal.SIGKILL)
    for client in clients:
        client.join(10)
        assert client.ended_s - killed_s < NOTICED_S
    for client in clients[:2]:
        events = [line for line in client.body.decode().split("\n") if line]
        assert events[-1] == "data: [DONE]"
        error = json.loads(events[-2].removeprefix("data: "))["error"]
        assert error["code"] == "engine_unavailable" and "SIGKILL" in error["message"]
    assert clients[2].status == 503 and b"SIGKILL" in clients[2].body
    assert server.process.wait(GONE_S) == 70 and "SIGKILL" in server.log
    wait_gone(server.engine_pids, 0.1)
    assert shared_memory() <= before


def test_server_killed_while_serving(server: Server, long_model: str, tmp_path: Path) -> None:
    """Clients see the connection close, the engine ends though it is busy, and the port is free for the next at once."""
    clients, pids, port = under_way(server), server.engine_pids, server.port
    killed_s = time.monotonic()
    server.process.kill()
    for client in clients:
        client.join(10)
        assert client.ended_s - killed_s < NOTICED_S and b"[DONE]" not in client.body
    wait_gone(pids, GONE_S)
    with serving(long_model, tmp_path / "again.txt", *FLAGS, "--port", str(port)) as again:
        assert again.port == port and again.post("/v1/completions", {**LONG, "max_tokens": 2}).status == 200


@pytest.mark.parametrize("phase", ["listening", "KV cache"])
@pytest.mark.parametrize("victim", ["server", "engine"])
def test_killed_while_starting(long_model: str, tmp_path: Path, victim: str, phase: str) -> None:
    """Whoever goes first takes the other along, in loading and in warm-up; a server without its engine says so and fails."""
    with serving(long_model, tmp_path / "log.txt", *FLAGS, wait=False) as server:
        server.wait_listening()
        deadline = time.monotonic() + 60
        while phase != "listening" and phase not in server.log:
            assert time.monotonic() < deadline
        pids = server.engine_pids
        os.kill(server.process.pid if victim == "server" else pids[0], signal.SIGKILL)
        status = server.process.wait(GONE_S)
        wait_gone(pids, GONE_S)
        assert status == -signal.SIGKILL if victim == "server" else status in (1, 70)
        assert victim == "server" or "SIGKILL" in server.log


def test_drain(server: Server) -> None:
    """SIGTERM: what is under way ends as if nothing had happened, new work is refused, the exit is clean."""
    body = {**LONG, "max_tokens": 1500}
    expected = server.post("/v1/completions", body).json["choices"][0]["text"]
    client = Client(server, {**body, "stream": True})
    assert client.has_begun.wait(30)
    kept = server.connect()  # a connection from before
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (ready := server.get("/health/ready")).status == 200:
        assert time.monotonic() < deadline
    assert ready.status == 503
    refused = server.post("/v1/completions", LONG)
    assert refused.status == 503 and refused.error["code"] == "shutting_down" and "retry-after" in refused.headers
    client.join(60)
    chunks = [json.loads(line[6:]) for line in client.body.decode().split("\n") if line.startswith("data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == expected and client.body.endswith(b"data: [DONE]\n\n")
    assert server.process.wait(10) == 0
    wait_gone(server.engine_pids, 1)
    kept.close()


def test_half_a_body_at_the_end(long_model: str, tmp_path: Path) -> None:
    """A request that was still coming when the server ended gets an error of ours, not uvicorn's."""
    with serving(long_model, tmp_path / "log.txt", *FLAGS) as server, server.connect() as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        client.sendall(head)
        time.sleep(
            0.3
        )  # it is being read by now; a request that was not would be closed without a word, which is right as well
        server.process.send_signal(signal.SIGTERM)
        said = b""
        while piece := client.recv(4096):
            said += piece
        assert said.startswith(b"HTTP/1.1 503") and b'"code":"shutting_down"' in said
        assert server.process.wait(10) == 0 and "Traceback" not in server.log


def test_drain_has_an_end(long_model: str, tmp_path: Path) -> None:
    """After the timeout what is left gets an error chunk; exit status 0."""
    with serving(long_model, tmp_path / "log.txt", *FLAGS, "--shutdown-timeout-s", "0.5") as server:
        clients = under_way(server)
        server.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(20)
        assert b"shutdown_timeout_s = 0.5" in clients[0].body and clients[0].body.endswith(b"data: [DONE]\n\n")
        assert clients[2].status == 503
        assert server.process.wait(10) == 0


def test_second_signal_ends_now(server: Server) -> None:
    """The first SIGTERM would wait 30 s for a request that takes longer; the second does not, and clients hear of no time that ran out."""
    clients = under_way(server)
    server.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while "second signal" not in server.log:
        assert time.monotonic() < deadline
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(10) == 0
    for client in clients:
        client.join(10)
    assert b"a second signal" in clients[0].body and b"shutdown_timeout_s" not in clients[0].body
    assert clients[0].body.endswith(b"data: [DONE]\n\n")


def test_a_stuck_engine_is_noticed(server: Server) -> None:
    """A stopped engine process: /health says so after engine_timeout_s, and is well again when it goes on."""
    pid = server.engine_pids[0]
    os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 20
        while (live := server.get("/health/live")).status == 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert live.error["code"] == "engine_stuck" and server.get("/health").status == 503
    finally:
        os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + 20
    while server.get("/health").status != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_several_engines_share_the_requests(long_model: str, tmp_path: Path) -> None:
    """Two engine processes: both work, both are in the metrics, and the death of one is the end of the server."""
    with serving(long_model, tmp_path / "log.txt", *FLAGS, "--num-engines", "2") as server:
        assert len(server.engine_pids) == 2
        clients = under_way(server)
        assert {engine: server.metric("vllm:num_requests_running", engine=engine) for engine in "01"} == {
            "0": 2,
            "1": 1,
        }
        os.kill(server.engine_pids[1], signal.SIGKILL)
        assert server.process.wait(GONE_S) == 70
        wait_gone(server.engine_pids, GONE_S)
        for client in clients:
            client.join(10)


def run_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xllm_core.cli", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)


def test_port_in_use(tiny_model: str) -> None:
    """Known before the model is touched; the message names the flag."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_serve(tiny_model, "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "--port" in done.stderr and "starts at" not in done.stderr


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    """The engine's own message, a few lines, exit status 1, no traceback."""
    done = run_serve(str(tmp_path / "no-such-model"), "--port", "0")
    assert done.returncode == 1 and "no-such-model" in done.stderr and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not re.match(r"xllm .* starts|  \w", line)]
    assert 1 <= len(lines) <= 3


def test_unix_socket(tiny_model: str, tmp_path: Path) -> None:
    """A socket for this user alone; one that a killed server left is taken over, a live one is not; it goes with the server."""
    path = tmp_path / "s"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with serving(tiny_model, tmp_path / "log.txt", *FLAGS, "--uds", str(path), wait=False) as server:
        deadline = time.monotonic() + 60
        while "ready after" not in server.log:
            assert server.process.poll() is None and time.monotonic() < deadline, server.log
            time.sleep(0.05)
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        second = run_serve(tiny_model, "--uds", str(path))
        assert second.returncode == 1 and "another server listens there" in second.stderr
        assert server.stop() == 0 and not path.exists()


def test_the_models_file_is_let_go(demo_model: str, tmp_path: Path) -> None:
    """Weights that took another form need it no more: it would stay in memory beside them. Mutation: no collection."""
    with serving(demo_model, tmp_path / "log.txt", "--dtype", "bfloat16", "--num-blocks", "64") as running:
        (engine,) = running.engine_pids
        deadline = time.monotonic() + 20  # at the first ping that finds nothing to do
        while ".gguf" in (mapped := Path(f"/proc/{engine}/maps").read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert "libtorch" in mapped
