"""`xllm run-batch` and `xllm chat --url`, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import FLAGS
from tests.server.rig import ROOT, Server

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def xllm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xllm_core.cli", *arguments]
    environment = ENVIRONMENT | options.pop("env", {})
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment, **options)


def ask(name: str, **body: Any) -> str:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return json.dumps(
        {"custom_id": name, "method": "POST", "url": url, "body": {"temperature": 0, "max_tokens": 4, **body}}
    )


def results(path: Path) -> dict[str, Any]:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({entry["custom_id"] for entry in entries}) == len(entries), "a line was answered twice"
    return {entry["custom_id"]: entry for entry in entries}


def test_good_and_bad_lines(server: Server, tmp_path: Path) -> None:
    """Good lines are answered as the server answers them; each bad one has its own error; a second run asks only those again."""
    lines = [
        ask("text", prompt="abc"), ask("chat", messages=[{"role": "user", "content": "x"}]), ask("bad field", prompt="abc", top_p=7),
        "{not json", json.dumps({"custom_id": "lost", "url": "/v1/nothing", "body": {}}), ask("text", prompt="twice"),
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    arguments = ("run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--url", server.url)
    done = xllm(*arguments)
    assert done.returncode == 1 and "2 are now, 4 failed" in done.stderr
    entries = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    good = {entry["custom_id"]: entry["response"] for entry in entries if entry["error"] is None}
    alone = server.post("/v1/completions", {"prompt": "abc", "temperature": 0, "max_tokens": 4}).json
    assert good["text"]["body"]["choices"] == alone["choices"] and good["text"]["status_code"] == 200
    assert good["chat"]["body"]["object"] == "chat.completion"
    told = " ".join(entry["error"]["message"] for entry in entries if entry["error"] is not None)
    assert all(words in told for words in ("top_p = 7", "not valid JSON", "/v1/nothing", "earlier line"))
    again = xllm(*arguments)
    assert again.returncode == 1 and "2 were answered before, 0 are now, 4 failed" in again.stderr


def test_killed_and_resumed(server: Server, tmp_path: Path) -> None:
    """Killed half way, with a torn last line: the second run asks only what is missing, and every id stands there once."""
    names = [f"n{i}" for i in range(60)]
    (tmp_path / "in.jsonl").write_text(
        "\n".join(ask(name, prompt=name, max_tokens=100, ignore_eos=True) for name in names)
    )
    out = tmp_path / "out.jsonl"
    command = [
        "run-batch",
        "-i",
        str(tmp_path / "in.jsonl"),
        "-o",
        str(out),
        "--url",
        server.url,
        "--max-concurrent",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "xllm_core.cli", *command], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = out.read_bytes()
    num_kept = kept.count(b"\n")
    assert num_kept < len(names), "it was over before it was killed, so this test proves nothing"
    out.write_bytes(kept + b'{"id": "batch_req_torn", "custom_')
    done = xllm(*command)
    assert done.returncode == 0 and f"{num_kept} were answered before, {len(names) - num_kept} are now" in done.stderr
    assert set(results(out)) == set(names) and out.read_bytes().startswith(kept)


def test_with_a_model_of_its_own(tiny_model: str, tmp_path: Path) -> None:
    """No server, no socket: the same answers from an engine that ends with the command."""
    (tmp_path / "in.jsonl").write_text(ask("a", prompt="abc", ignore_eos=True))
    flags = FLAGS[: FLAGS.index("--served-model-name")]
    done = xllm("run-batch", tiny_model, "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *flags)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out.jsonl")["a"]["response"]["body"]["usage"]["completion_tokens"] == 4
    assert "\r" not in done.stderr, "a progress bar without a terminal"


def test_more_prompts_than_a_server_lets_wait(tiny_model: str, tmp_path: Path) -> None:
    """With an engine of its own nothing is refused for being much, and a link to the output stays one."""
    lines = [ask(f"n{i}", prompt=["abc"] * 100, max_tokens=1) for i in range(12)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    (tmp_path / "real.jsonl").touch()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "real.jsonl")
    flags = FLAGS[: FLAGS.index("--served-model-name")]
    done = xllm("run-batch", tiny_model, "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *flags)
    assert done.returncode == 0, done.stderr
    assert len(results(tmp_path / "real.jsonl")) == 12 and (tmp_path / "out.jsonl").is_symlink()


def test_an_output_that_is_no_result(tmp_path: Path) -> None:
    """A file of something else is not touched."""
    (tmp_path / "in.jsonl").write_text(ask("a", prompt="abc"))
    (tmp_path / "notes.txt").write_text("my notes\n")
    beside = xllm("run-batch", "-i", "x", "-o", "y", "--url", "http://127.0.0.1:9", "--dtype", "float32")
    assert beside.returncode == 2 and "--dtype is a setting of the server" in beside.stderr
    done = xllm(
        "run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "notes.txt"), "--url", "http://127.0.0.1:9"
    )
    assert done.returncode == 1 and "--fresh" in done.stderr and (tmp_path / "notes.txt").read_text() == "my notes\n"


def test_chat_with_a_server(server: Server) -> None:
    """The answer on stdout, figures on stderr; a server's refusal is one line."""
    done = xllm("chat", "--url", server.url, "-m", "hi", "--temperature", "0", "--max-tokens", "5", "--ignore-eos")
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    expected = server.post("/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    assert done.returncode == 0 and done.stdout == expected + "\n" and "5 new" in done.stderr
    wrong = xllm("chat", "other-model", "--url", server.url, "-m", "hi")
    assert wrong.returncode == 1 and "other-model" in wrong.stderr and "Traceback" not in wrong.stderr
    assert xllm("chat", "--url", server.url, "-m", "hi", "--dtype", "float32").returncode == 2
    nobody = xllm("chat", "--url", "http://127.0.0.1:9", "-m", "hi")
    assert nobody.returncode == 1 and "does not answer" in nobody.stderr
