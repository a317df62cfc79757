"""`xllm bench serve` as it is typed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner, Result

from tests.loadgen.conftest import MODEL, FakeServer, answer
from xllm_core.cli import root
from xllm_core.loadgen.workload import Ask, Prompts, read_trace


def bench(server: FakeServer, *arguments: str, **env: str) -> Result:
    """Run it against the server."""
    return CliRunner().invoke(root(), ["bench", "serve", "--url", server.url, *arguments], env=env)


def figures(result: Result) -> dict[str, Any]:
    """The last line, without the conditions that it must have as well."""
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert found.pop("conditions")["server"]
    return found


def test_a_whole_run(server: FakeServer, tmp_path: Path) -> None:
    """Figures, conditions and every sample are written. Dies if one is missing, or the figures are not those of the samples."""
    path = tmp_path / "run.json"
    result = bench(
        server, "--clients", "2", "--num-requests", "6", "--input-len", "7", "--output-len", "5", "--seed", "9",
        "--json", str(path), "--goodput", "ttft:10m", "tpot:10m",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    written = json.loads(path.read_text())
    assert written["figures"] == figures(result)
    assert written["figures"]["completed"] == 6 and written["figures"]["output_tokens"] == 30
    assert written["figures"]["goodput"] == {
        **written["figures"]["goodput"],
        "targets_s": {"ttft": 600, "tpot": 600},
        "share": 1.0,
    }
    conditions = written["conditions"]
    assert conditions["server"] == {"url": server.url, "version": {"version": "9.9"}, "models": server.models}
    assert conditions["load"] == {
        "seed": 9, "prompt_mode": "ids", "input_len": 7, "output_len": 5, "clients": 2, "num_requests": 6
    }  # fmt: skip
    assert conditions["model"] == MODEL and set(conditions["versions"]) == {"xllm-core", "python", "aiohttp"}
    assert len(written["samples"]) == 6 and all(len(sample["chunk_s"]) == 5 for sample in written["samples"])
    warm_up, *bodies = server.bodies
    assert warm_up["max_tokens"] == 4 and warm_up["prompt"] not in [body["prompt"] for body in bodies]
    assert {len(body["prompt"]) for body in bodies} == {7}
    assert all(body["ignore_eos"] is True and body["max_tokens"] == 5 for body in bodies)
    assert "prompts were in the server's cache, as after a run with the same --seed" in result.stdout
    assert f"{server.url}, {MODEL}, 2 clients, 6 requests of 7 + 5 tokens, seed 9" in result.stdout


def test_a_trace(server: FakeServer, tmp_path: Path) -> None:
    """Lengths and order of the trace with the factors that are stated beside the figures. Dies if a factor is left out of either."""
    path = tmp_path / "trace.jsonl"
    rows = [(0, 1024, 40, [0, 1]), (500, 1100, 80, [0, 1, 5]), (900, 512, 20, [0])]
    path.write_text(
        "".join(
            json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": h}) + "\n"
            for t, i, o, h in rows
        )
    )
    options = (
        "--trace",
        str(path),
        "--length-factor",
        "0.1",
        "--time-factor",
        "0.2",
        "--json",
        str(tmp_path / "x.json"),
    )
    result = bench(server, *options, "--num-warmups", "0")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "3 requests of trace.jsonl, lengths x 0.1, times x 0.2, seed 0" in result.stdout
    prompts, asks = Prompts.of_vocabulary(0, 1000), read_trace(path, length_factor=0.1, time_factor=0.2)
    assert sorted(body["prompt"] for body in server.bodies) == sorted(prompts.ids(ask) for ask in asks)
    load = json.loads((tmp_path / "x.json").read_text())["conditions"]["load"]
    assert (load["trace"], load["length_factor"], load["time_factor"]) == ("trace.jsonl", 0.1, 0.2)
    assert figures(result)["client_lag_ms"] is not None and "same --seed" not in result.stdout
    for more, words in (
        (("--clients", "2"), "2 clients, 3 requests of trace.jsonl"),
        (("--rate", "100"), "100 requests/s, 3"),
    ):
        result = bench(server, "--trace", str(path), "--length-factor", "0.1", *more)
        assert result.exit_code == 0 and words in result.stdout, result.output


def test_failures_make_the_exit_status_1(server: FakeServer) -> None:
    """And are counted. Dies if a server that refuses half of the load looks well."""
    server.respond = lambda number, body: web.Response(status=500, text="ouch") if number % 2 else answer(body)
    result = bench(server, "--clients", "1", "--num-requests", "4", "--num-warmups", "0")
    assert result.exit_code == 1
    assert figures(result)["errors"] == [{"kind": "http", "status": 500, "count": 2, "example": "ouch"}]
    assert "2 of 4 completed, 2 failed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clients", "2", "--rate", "3"], "give one of them"),
        (["ttft:5ms"], "targets follow --goodput"),
        (["--endpoint", "chat"], "add --prompt-mode text"),
        (["--length-factor", "0.5"], "--length-factor scales a trace"),
        (["--time-factor", "0.5"], "--time-factor scales the times of a trace"),
        (["--trace", "x.csv", "--input-len", "5"], "drop --input-len"),
        (["--trace", "x.csv", "--clients", "5", "--time-factor", "2"], "without --clients and --rate"),
        (["--prompt-mode", "text", "--vocab-size", "5"], "drop it or --prompt-mode text"),
        (["--goodput", "ttft:soon"], "--goodput ttft:soon: write NAME:TIME"),
        (["--extra-body", "[1]"], "--extra-body: a JSON object is due"),
        (["--extra-body", "{"], "--extra-body: not valid JSON"),
        (["--api-key-env", "NOT_THERE"], "--api-key-env NOT_THERE: the variable is not set"),
        (["--trace", "nowhere.csv"], "cannot read the trace nowhere.csv"),
        (["--input-len", "4090"], "100 of 100 requests are longer than the model's context of 4096 tokens"),
    ],
)
def test_wrong_options(server: FakeServer, arguments: list[str], words: str) -> None:
    """Said before the first request. Dies if an option that does nothing is passed over."""
    result = bench(server, *arguments)
    assert result.exit_code != 0
    assert words in result.output + str(result.exception)
    assert not server.bodies


def test_servers_that_cannot_be_measured(server: FakeServer) -> None:
    """Each in one line, with what to do. Dies with a traceback, or a run of nothing but failures."""
    server.respond = lambda number, body: web.json_response(
        {"error": {"message": "token 900 is not in [0, 128)"}}, status=400
    )
    result = bench(server)
    assert result.exit_code == 1
    assert "the first request failed (http 400): token 900 is not in [0, 128); --vocab-size must not" in result.output
    server.models = None
    assert "name one with --model" in str(bench(server).exception)
    server.url = "http://127.0.0.1:1"
    result = bench(server)
    assert result.exit_code == 1 and "is the server up, and --url right?" in result.output


def test_a_key_and_a_server_without_facts(server: FakeServer) -> None:
    """Chat with a key from a variable, against a server that lists no models."""
    server.models = None
    options = (
        "--model",
        "m",
        "--endpoint",
        "chat",
        "--prompt-mode",
        "text",
        "--num-requests",
        "2",
        "--api-key-env",
        "KEY",
    )
    result = bench(server, *options, "--no-ignore-eos", "--output-len", "3", KEY="canary7")
    assert result.exit_code == 0, (result.output, result.exception)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer canary7"}
    assert all(body["model"] == "m" and "ignore_eos" not in body for body in server.bodies)
    assert "canary7" not in result.output
    assert bench(server, *options[:-2], "--output-len", "3", XLLM_API_KEY="canary8").exit_code == 0
    assert server.headers[-1]["Authorization"] == "Bearer canary8"


def test_ctrl_c_prints_what_was_measured(server: FakeServer) -> None:
    """In a process of its own: two are answered, the third hangs. Without a terminal there is no progress bar either."""
    server.respond = lambda number, body: answer(body) if number < 2 else [answer(body)[1], threading.Event()]
    command = [sys.executable, "-m", "xllm_core.cli", "bench", "serve", "--url", server.url, "--clients", "1"]
    process = subprocess.Popen(
        [*command, "--num-warmups", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end_s = time.monotonic() + 60
    while len(server.bodies) < 3 and time.monotonic() < end_s:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert err == ""
    assert "2 of 2 completed, 0 failed, 1 cut off" in out
    assert json.loads(out.splitlines()[-1])["unfinished"] == 1


def test_a_plot_without_matplotlib(server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Told before the run, not after it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = bench(server, "--plot", str(tmp_path))
    assert re.search(r"pip install 'xllm-core\[plots\]'", str(result.exception)) and not server.bodies


def test_prompts_are_those_of_the_seed(server: FakeServer) -> None:
    """Two runs with one seed ask for the same. Dies if the clock has a part in it."""
    for _ in range(2):
        assert bench(server, "--num-requests", "3", "--output-len", "2", "--seed", "4", "--clients", "1").exit_code == 0
    assert server.bodies[:4] == server.bodies[4:]
    assert server.bodies[1]["prompt"] == Prompts.of_vocabulary(4, 1000).ids(Ask(0, 128, 2))
