"""Whatever happens to master, providers, values or the client's process: the text is that of no store, and late by no more than is stated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import NUM_BLOCKS, EngineProcess, Pair
from .real_master import Master, wait_for

LOOKUP_S, LOAD_S = 0.5, 2.0
"""The defaults of lookup_timeout_s and load_timeout_s. A first token is late by their sum at most; README, "When something fails"."""

SLACK_S = 1.5
"""On top of the bound: this machine may be busy. Together they are less than the 4.3 s for which a call of Mooncake blocks where its master is
dead."""

STEP_S = 2.0
"""A step of this model takes milliseconds, and a blocked call of Mooncake four seconds and more."""

TOOL = Path(__file__).with_name("store_tool.py")


def tool(master: Master, *what: str) -> list[str]:
    """Run `store_tool.py`."""
    return [sys.executable, str(TOOL), master.address, str(master.metrics_port), *what]


@pytest.fixture
def provider(master: Master) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody else whose memory holds the blocks."""
    process = subprocess.Popen(
        tool(master, "provide", str(32 << 20)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def is_right(found: dict[str, Any], expected: list[list[int]], *, late_s: float = LOOKUP_S + LOAD_S) -> None:
    """The tokens of no store, none of them late by more than the bound, and no step that waited."""
    assert found["tokens"] == expected
    assert max(found["first_s"]) <= late_s + SLACK_S, found
    assert found["longest_step_s"] < STEP_S, found


def closed_again(one: EngineProcess) -> None:
    """Wait until the breaker has closed by itself: nothing is asked of the engine meanwhile."""
    wait_for(lambda: not one.stats()["breaker_is_open"], "closed breaker")


def shared_again(pair: Pair) -> None:
    """Wait until `second` loads what `first` stored. Mooncake takes a moment to lend its memory again, and refuses the first blocks."""
    before = pair.second.stats()["loaded_blocks"]

    def is_shared() -> bool:
        for one in (pair.first, pair.second):
            one.ask(do="reset")
            is_right(one.generate(*pair.prompts), pair.expected)
            one.ask(do="settle")
        return pair.second.stats()["loaded_blocks"] >= before + NUM_BLOCKS

    wait_for(is_shared, "sharing of blocks")


def test_the_master_dies_and_comes_back(pair: Pair) -> None:
    """Killed, requests are answered as if there were no store. Restarted on its port, blocks are stored and found again, nobody having said so."""
    pair.store()
    pair.master.kill()
    is_right(pair.second.generate(*pair.prompts), pair.expected)
    gained = pair.delta()
    assert (gained["breaker_is_open"], gained["breaker_openings"], gained["loaded_blocks"]) == (1, 1, 0), gained
    pair.second.ask(do="reset")
    before = pair.second.generate([3, 4])["waited"]
    found = pair.second.generate(*pair.prompts)
    is_right(found, pair.expected, late_s=0.0)
    assert found["waited"] == before, "while the breaker is open no request waits"
    pair.master.restart()
    closed_again(pair.second)
    shared_again(pair)


def test_the_master_hangs(pair: Pair) -> None:
    """It keeps its port and answers nothing: probes of the port see no harm, time limits do."""
    pair.store()
    pair.master.pause()
    is_right(pair.second.generate(*pair.prompts), pair.expected)
    wait_for(lambda: pair.second.stats()["breaker_is_open"], "open breaker")
    assert pair.delta()["loaded_blocks"] == 0
    pair.master.resume()
    closed_again(pair.second)
    shared_again(pair)


def test_a_provider_dies(
    master: Master, provider: subprocess.Popen[bytes], engine: Callable[..., EngineProcess], pair: Pair
) -> None:
    """The master still says that its blocks are held, and nobody has them."""
    first, second = engine(master, segment_bytes=0), engine(master, segment_bytes=0)

    def is_stored() -> bool:
        first.generate(*pair.prompts)
        first.ask(do="settle")
        return first.stats()["stored_blocks"] >= NUM_BLOCKS

    wait_for(is_stored, "blocks in the store")
    provider.kill()
    provider.wait()
    is_right(second.generate(*pair.prompts), pair.expected)
    stats = second.stats()
    assert stats["loaded_blocks"] == 0 and stats["hits"] >= 1 and stats["failed_loads"] >= 1, stats
    second.ask(do="reset")
    is_right(second.generate(*pair.prompts), pair.expected)
    second.process.kill()
    pid = stats["client_pid"]
    wait_for(
        lambda: not Path(f"/proc/{pid}").exists() or ") Z" in Path(f"/proc/{pid}/stat").read_text(),
        "end of the client's process",
    )


@pytest.mark.parametrize("how", ["flip", "cut", "grow", "empty", "swap"])
def test_values_that_are_not_what_was_stored(how: str, pair: Pair) -> None:
    """Each is found out, counts, is taken out and computed again; after that the store is whole, though keys are written once."""
    pair.store()
    done = subprocess.run(tool(pair.master, how), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and int(done.stdout) >= NUM_BLOCKS, done.stderr[-2000:]
    is_right(pair.second.generate(*pair.prompts), pair.expected)
    gained = wait_for(lambda: (found := pair.delta())["bad_values"] and found, "bad values found")
    assert gained["loaded_blocks"] == 0 and gained["breaker_openings"] == 0, gained
    shared_again(pair)


def test_the_clients_process_dies(pair: Pair) -> None:
    """It is started anew, and the engine does not notice more than a miss."""
    old = pair.second.stats()["client_pid"]
    os.kill(old, signal.SIGKILL)
    is_right(pair.second.generate(*pair.prompts), pair.expected)
    wait_for(lambda: pair.delta()["breaker_openings"], "notice of the dead process")
    closed_again(pair.second)
    assert pair.second.stats()["client_pid"] != old
    shared_again(pair)
