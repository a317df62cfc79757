"""`xllm ascend bringup MODEL`: what could not be proven without an NPU, asked of one. The last line is JSON with everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

_TIMEOUT_S = 4 * 3600.0


@dataclass(frozen=True, slots=True)
class Job:
    """What is run. quick: the small matrix of verify and few requests. device_index: as `[device] index`."""

    model: str
    device_index: int
    is_quick: bool
    num_prompts: int
    input_len: int
    output_len: int


@click.command("bringup")
@click.argument("model")
@click.option("--device-index", default=0, show_default=True, help="Which NPU.")
@click.option("--quick", "is_quick", is_flag=True, help="The small matrix of verify.")
@click.option("--num-prompts", default=256, show_default=True, help="Requests of the throughput figure.")
@click.option("--input-len", default=512, show_default=True, help="Prompt tokens of each.")
@click.option("--output-len", default=128, show_default=True, help="New tokens of each.")
def command(model: str, device_index: int, is_quick: bool, num_prompts: int, input_len: int, output_len: int) -> None:
    """Prove this plugin on the NPU that is here: kernels against the reference, tokens of MODEL, throughput.

    MODEL is a directory or hub id of a dense model. Exit code 1 if something differs, 2 if no NPU can be used here.
    """
    if missing := _ask("import json; from xllm_ascend.probe import probe; print(json.dumps(probe()))"):
        click.echo(f"no NPU can be used here: {missing}", err=True)
        click.echo(json.dumps({"ok": False, "problem": missing}))
        sys.exit(2)
    job = Job(model, device_index, is_quick, num_prompts, input_len, output_len)
    results: dict[str, Any] = {"job": asdict(job), "machine": machine(device_index)}
    click.echo(f"machine: {results['machine']}")
    parts: dict[str, Callable[[Job], dict[str, Any]]] = {
        "conformance": conformance,
        "verify": verify,
        "throughput": throughput,
    }
    for name, part in parts.items():
        results[name] = part(job)
        click.echo(f"{name}: {'passed' if results[name]['ok'] else 'FAILED'}, {results[name]['words']}")
    results["ok"] = all(results[name]["ok"] for name in parts)
    click.echo(json.dumps(results))
    sys.exit(0 if results["ok"] else 1)


def machine(index: int) -> dict[str, Any]:
    """What it runs on."""
    return dict(
        _ask(
            "import json, torch, torch_npu; print(json.dumps({'torch': torch.__version__, 'torch_npu': torch_npu.__version__, "
            f"'npu': torch.npu.get_device_name({index}), 'total_bytes': torch.npu.mem_get_info({index})[1], "
            "'cann': getattr(torch_npu.version, 'cann', None)}))"
        )
    )


def conformance(job: Job) -> dict[str, Any]:
    """The kit: every op and attention against the reference, the device, and the matrix on a tiny model. Needs pytest."""
    with tempfile.TemporaryDirectory(prefix="xllm-ascend-") as folder:
        path = Path(folder) / "report.json"
        done = _xllm("plugins", "check", "ascend", "--require-device", "--report", str(path))
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return {"ok": done.returncode == 0, "report": report, "words": _last_line(done)}


def verify(job: Job) -> dict[str, Any]:
    """The matrix on the real model: its tokens do not depend on what is switched on."""
    done = _xllm(
        "verify", job.model, "--dtype", "bfloat16", *_device(job), "--json", *(["--quick"] if job.is_quick else [])
    )
    if done.returncode not in (0, 1) or not done.stdout.strip():
        return {"ok": False, "report": None, "words": _last_line(done)}
    (report,) = json.loads(done.stdout.splitlines()[-1])
    wrong = [row["feature"] for row in report["rows"] if not row["is_identical"]]
    return {
        "ok": done.returncode == 0,
        "report": report,
        "words": f"{len(report['rows'])} rows" + (f", different: {', '.join(wrong)}" if wrong else ""),
    }


def throughput(job: Job) -> dict[str, Any]:
    """Output tokens per second, all requests at once."""
    sizes = [
        "--num-prompts",
        str(job.num_prompts),
        "--input-len",
        str(job.input_len),
        "--output-len",
        str(job.output_len),
    ]
    done = _xllm("bench", "throughput", job.model, "--dtype", "bfloat16", *_device(job), *sizes, "--json")
    if done.returncode:
        return {"ok": False, "report": None, "words": _last_line(done)}
    report = json.loads(done.stdout.splitlines()[-1])
    return {"ok": True, "report": report, "words": f"{report['output_tokens_per_s']:.1f} output tokens/s"}


def _device(job: Job) -> list[str]:
    return ["--use", "device=ascend/npu", "--device-index", str(job.device_index)]


def _ask(code: str) -> Any:
    """What a Python process of its own prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise click.ClickException(f"a question to the device failed: {_last_line(done)}")
    return json.loads(done.stdout.splitlines()[-1])


def _xllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-m", "xllm_core.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    said = (done.stdout if done.returncode in (0, 1) and done.stdout.strip() else done.stderr).strip().splitlines()
    return said[-1] if said else f"it ended with status {done.returncode} and said nothing"
