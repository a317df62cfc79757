"""How long do `import xllm_core` and `xllm --help` take?

Method: child processes, bare Python and ours in turns, ten of each; medians of wall time. The import is reported over bare Python.

    python -m benchmarks.start_up | tail -1 | jq .
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

_ROUNDS = 10


def run() -> dict[str, Any]:
    """Milliseconds."""
    commands = {
        "bare": [sys.executable, "-c", "pass"],
        "import": [sys.executable, "-c", "import xllm_core"],
        "help": [sys.executable, "-m", "xllm_core.cli", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(_ROUNDS + 1):
        for name, command in commands.items():
            started_s = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[name].append((time.perf_counter() - started_s) * 1e3)
    medians = {name: sorted(values[1:])[_ROUNDS // 2] for name, values in times.items()}  # the first warms the disk
    return {"import_over_bare_ms": round(medians["import"] - medians["bare"], 1), "help_ms": round(medians["help"], 1)}


if __name__ == "__main__":
    print(json.dumps(run()))
