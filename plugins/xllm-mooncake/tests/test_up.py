"""`xllm mooncake up`, and where everything listens."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from xllm_mooncake import remote
from xllm_mooncake.client import answers
from xllm_mooncake.settings import MooncakeTable
from xllm_mooncake.store import MooncakeStore

from xllm_core.plugins import ConfigError
from xllm_core.testing.store_bench import geometry

from .real_master import SMALL, Master, free_port, wait_for

XLLM = [sys.executable, "-m", "xllm_core.cli", "mooncake", "up"]


def listeners(pid: int) -> set[str]:
    """Addresses on which a process listens, ports left out, as `ss` tells them."""
    if (ss := shutil.which("ss")) is None:
        message = "ss is not installed; apt-get install iproute2"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    lines = subprocess.run([ss, "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[3].rpartition(":")[0] for line in lines if f"pid={pid}," in line}


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


@pytest.fixture
def up() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command, and its port."""
    port = free_port()
    process = subprocess.Popen(
        [*XLLM, "--port", str(port), "--metrics-port", str(free_port())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process, port
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_up_runs_a_master_until_it_is_told_to_end(up: tuple[subprocess.Popen[str], int], end: signal.Signals) -> None:
    """It says when it is ready and what to paste, listens on loopback only, and leaves nobody behind."""
    process, port = up
    assert process.stdout is not None
    said = ""
    while "allow_wildcard" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    assert f"ready on 127.0.0.1:{port}" in said
    pasted = tomllib.loads(said[said.index("[use]") :])
    assert MooncakeTable.model_validate(pasted["plugin"]["mooncake"]).master == f"127.0.0.1:{port}"
    (master,) = children(process.pid)
    assert listeners(master) == {"127.0.0.1"}
    process.send_signal(end)
    process.wait(15)
    assert process.returncode == 0, process.stdout.read()
    wait_for(lambda: not answers(f"127.0.0.1:{port}"), "end of the master")


def test_up_refuses_a_port_that_is_taken(master: Master) -> None:
    """With the option that helps."""
    done = subprocess.run([*XLLM, "--port", str(master.port)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "give another with --port" in done.stderr) == (1, True), done.stderr


def test_up_refuses_one_port_for_both() -> None:
    """Before anything starts. Killed by: a master said to be ready, which then ends."""
    done = subprocess.run(
        [*XLLM, "--port", "50051", "--metrics-port", "50051"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "") and "cannot serve both" in done.stderr, done.stdout + done.stderr


def test_up_names_what_is_missing(tmp_path: Path) -> None:
    """Without the wheel: what to install. The child's path has everything but Mooncake."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'mooncake' else find(name, *a)\n"
        "from xllm_core.cli import main; sys.exit(main(['mooncake', 'up', '--port', '1']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 1 and "pip install 'xllm-mooncake[host]'" in done.stderr, done.stderr


def test_what_listens(master: Master) -> None:
    """The master: loopback. The engine's own process: nothing. Mooncake's client: every address, which is why it needs consent."""
    assert master.process is not None and listeners(master.process.pid) == {"127.0.0.1"}
    before = listeners(os.getpid())
    store = MooncakeStore(master.settings, geometry("BSGD", 4))
    try:
        assert store.client_pid is not None
        assert listeners(store.client_pid) == {"0.0.0.0", "*"}, "if this is loopback now, the consent is needed no more"
        assert listeners(os.getpid()) == before
    finally:
        store.close()


def test_without_consent_nothing_starts(master: Master) -> None:
    """The message says what would listen, and the line that agrees."""
    settings, before = {**master.settings, "allow_wildcard_listeners": False}, children(os.getpid())
    with pytest.raises(ConfigError, match=re.escape("[plugin.mooncake] allow_wildcard_listeners = true")):
        MooncakeStore(settings, geometry("BSGD", 4))
    assert children(os.getpid()) == before


def test_without_a_master() -> None:
    """Refused at once with the command that helps; or, if so asked, started without."""
    settings = {**SMALL, "master": f"127.0.0.1:{free_port()}"}
    with pytest.raises(ConfigError, match="xllm mooncake up"):
        MooncakeStore(settings, geometry("BSGD", 4))
    store = MooncakeStore({**settings, "must_start": False}, geometry("BSGD", 4))
    assert store.stats()["breaker_is_open"] == 1
    store.close()
    with pytest.raises(ConfigError, match="no master answers there"):  # no host can have that name
        MooncakeStore({**SMALL, "master": f"{'a' * 64}:50051"}, geometry("BSGD", 4))


@contextmanager
def silent_listener(port: int) -> Iterator[list[socket.socket]]:
    """Takes connections and says nothing; at the end it drops them. Yields them."""
    taken: list[socket.socket] = []

    def take() -> None:
        with suppress(OSError):
            while True:
                taken.append(listener.accept()[0])

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield taken
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for one in taken:
                one.close()


def test_what_listens_there_is_no_master(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said in so many words after a while; and once a master has taken the port, a store that began without it is connected. Killed by: a
    client whose set-up was given up, failed later, and is asked for ever as if it were connected.
    """
    monkeypatch.setattr(remote, "_SETUP_TIMEOUT_S", 0.5)
    master = Master()
    master.kill()
    settings = {**master.settings, "must_start": False}
    with silent_listener(master.port), pytest.raises(ConfigError, match="is it a mooncake_master"):
        MooncakeStore(master.settings, geometry("BSGD", 4))
    store = MooncakeStore(settings, geometry("BSGD", 4))
    try:
        with silent_listener(master.port) as taken:
            wait_for(lambda: len(taken) > 1, "a set-up")
            wait_for(
                lambda: "set-up" in store._remote._breaker.reason or "setup" in store._remote._breaker.reason, "its end"
            )
        monkeypatch.undo()
        time.sleep(0.5)  # long enough for the set-up to fail
        master.restart()
        wait_for(lambda: not store.stats()["breaker_is_open"], "closed breaker", timeout_s=15.0)
    finally:
        store.close()
        master.kill()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"master": "here"}, "HOST:PORT"),
        ({"master": "h:0"}, "HOST:PORT"),
        ({"master": "h:²"}, "HOST:PORT"),
        ({"secret": "x" * 65}, "64 bytes"),
        ({"mastr": "h:1"}, "mastr"),
    ],
)
def test_settings_are_checked(wrong: dict[str, str], words: str) -> None:
    """Each wrong value with a word on it."""
    with pytest.raises(ValueError, match=words):
        MooncakeTable.model_validate(wrong)


def test_a_block_that_does_not_fit_into_staging(master: Master) -> None:
    """The message has the number that would do."""
    big = geometry("BSGD", 512)
    with pytest.raises(ConfigError, match="set at least") as caught:
        MooncakeStore({**master.settings, "staging_bytes": 1 << 16}, big)
    enough = int(str(caught.value).rpartition(" ")[2])
    MooncakeStore({**master.settings, "staging_bytes": enough}, big).close()
