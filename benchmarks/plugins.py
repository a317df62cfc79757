"""What do installed plugins cost: at assembly, in the list of plugins, and between two tokens?

Method: twenty made-up distributions (entry point, metadata, settings model, specs for ops, attention, models, schedulers, samplers and
stores; four of them a device with a probe that says no) lie on the path of one arm and not on the other's. Child processes take turns
(with, without, without, with, ...). Assembly: discovery, loading and every choice for a tiny random Llama, the time between the first line of
ours and the locked plan; the figure is the difference within a pair. Loading must not import torch, nor discovery happen more than once:
both are counted. A step: bookkeeping (schedule, prepare, emit) of 8 sequences decoding together in one engine with the plugins and one
without; the ratio of medians. `xllm plugins list`: wall time of the command with all twenty.

Not measured: the import of torch, which the chosen device needs with or without plugins; real drivers' probes, which take their own time.

    python -m benchmarks.plugins --pairs 10 | tail -1 | jq .
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import conditions
from benchmarks.pairs import interleave

NUM_PLUGINS, NUM_DEVICES = 20, 4

_PLUGIN = """
from xllm_core.plugins import (
    AttentionSpec, DeviceSpec, KVStoreSpec, ModelSpec, OpSpec, PluginInfo, SamplerSpec, SchedulerSpec, hookimpl,
)
xllm_plugin = PluginInfo(id="{id}", config="{package}.settings:Table")
{device}
@hookimpl
def xllm_ops():
    for op in ("linear", "rms_norm", "rope", "silu_mul"):
        yield OpSpec(name=op, op=op, target="{package}.parts:X", devices={{"{id}"}}, dtypes={{"bfloat16"}}, rank=5)
@hookimpl
def xllm_attention():
    yield AttentionSpec(name="flash", target="{package}.parts:X", devices={{"{id}"}}, dtypes={{"bfloat16"}}, rank=5)
@hookimpl
def xllm_models():
    yield ModelSpec(name="m", target="{package}.parts:X", architectures={{"{package}ForCausalLM"}})
@hookimpl
def xllm_schedulers():
    yield SchedulerSpec(name="s", target="{package}.parts:X", rank=-5)
@hookimpl
def xllm_samplers():
    yield SamplerSpec(name="s", target="{package}.parts:X", devices={{"{id}"}})
@hookimpl
def xllm_kv_stores():
    yield KVStoreSpec(name="s", target="{package}.parts:X")
"""
_DEVICE = """
@hookimpl
def xllm_devices():
    yield DeviceSpec(name="d", target="{package}.parts:X", probe="{package}.probe:probe", is_accelerator=True, rank=5)
"""
_SETTINGS = """
from pydantic import BaseModel
class Table(BaseModel):
    size: int = 1
    name: str = "x"
"""


def main() -> None:
    """Print a line per figure and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--child", choices=("assemble", "steps"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(assemble_once(args.model) if args.child == "assemble" else run_steps(args.model)))
        return
    print(json.dumps(run(args.pairs)))


def run(num_pairs: int) -> dict[str, Any]:
    """Figures with their conditions. Milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        site = write_plugins(Path(folder) / "site")
        model = str(write_model(Path(folder) / "model"))
        return {
            "conditions": conditions(),
            **_measure(site, model, num_pairs),
            "read_gb_s_after": conditions()["read_gb_s"],
        }


def _measure(site: Path, model: str, num_pairs: int) -> dict[str, Any]:
    answers: dict[bool, list[dict[str, Any]]] = {True: [], False: []}

    def arm(is_with: bool, what: str, figure: str) -> float:
        answer = _child(what, model, site if is_with else None)
        answers[is_with].append(answer)
        return float(answer[figure])

    for is_with in (True, False):
        arm(is_with, "assemble", "assemble_ms")  # warms the disk
    assembly = interleave(
        lambda i: arm(True, "assemble", "assemble_ms"), lambda i: arm(False, "assemble", "assemble_ms"), num_pairs
    )
    added = sorted(a - b for a, b in zip(assembly.ours, assembly.theirs, strict=True))
    loads_torch = any(answer["torch_after_load"] for answer in answers[True])
    discoveries = {answer["discoveries"] for answer in answers[True]}
    steps = interleave(lambda i: arm(True, "steps", "step_ms"), lambda i: arm(False, "steps", "step_ms"), num_pairs)
    listing = sorted(_list_ms(site) for _ in range(num_pairs + 1))
    return {
        "assembly_added_ms": {"median": round(added[len(added) // 2], 1), "all": [round(x, 1) for x in added]},
        "assembly_ms": {"with": [round(x, 1) for x in assembly.ours], "without": [round(x, 1) for x in assembly.theirs]},
        "torch_imported_by_loading": loads_torch, "discoveries": sorted(discoveries),
        "list_ms": round(listing[len(listing) // 2], 1),
        "step": {
            "ratio": round(steps.median, 3), "interval": [round(steps.low, 3), round(steps.high, 3)],
            "with_ms": [round(x, 4) for x in steps.ours], "without_ms": [round(x, 4) for x in steps.theirs],
        },
    }  # fmt: skip


def _child(what: str, model: str, site: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plugins", "--child", what, "--model", model]
    done = subprocess.run(command, env=_environment(site), capture_output=True, text=True, check=False)
    if done.returncode:  # what else it says, forty times, is that no device of these plugins is here
        raise RuntimeError(f"{what} ended with status {done.returncode}:\n{done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _environment(site: Path | None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(site)} if site else dict(os.environ)


def _list_ms(site: Path) -> float:
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "xllm_core.cli", "plugins", "list"]
    done = subprocess.run(command, env=_environment(site), capture_output=True, text=True, check=True)
    assert done.stdout.count("bench") >= NUM_PLUGINS
    return (time.perf_counter() - started_s) * 1e3


def assemble_once(model: str) -> dict[str, Any]:
    """In a child: one assembly."""
    import importlib_metadata

    from xllm_core.config import Settings
    from xllm_core.plugins.manager import PluginManager
    from xllm_core.plugins.resolve import assemble

    found = importlib_metadata.entry_points
    calls = []

    def counted(**wanted: str) -> Any:
        calls.append(wanted)
        return found(**wanted)

    importlib_metadata.entry_points = counted
    started_s = time.perf_counter()
    settings = Settings(model={"path": model})
    manager = PluginManager.discover(settings).load()
    has_torch = "torch" in sys.modules
    loaded_s = time.perf_counter()
    import torch  # noqa: F401  both arms need it for the device; its time is not ours

    imported_s = time.perf_counter()
    assemble(settings, manager)
    elapsed_s = time.perf_counter() - started_s - (imported_s - loaded_s)
    return {"assemble_ms": elapsed_s * 1e3, "torch_after_load": has_torch, "discoveries": len(calls)}


def run_steps(model: str) -> dict[str, Any]:
    """In a child: the median bookkeeping of steps in which eight sequences decode."""
    from xllm_core.benchmark import Load, run_round
    from xllm_core.frontend.start import start_in_process

    processor = start_in_process(model, max_num_seqs=8, overlap=False, num_blocks=512)
    records = run_round(processor, Load(num_prompts=8, input_len=16, output_len=200), show=False).records
    processor.client.close()
    steps = sorted((r.schedule_s + r.prepare_s + r.emit_s) * 1e3 for r in records if r.num_rows == r.num_tokens == 8)
    return {"step_ms": steps[len(steps) // 2]}


def write_plugins(site: Path) -> Path:
    """Twenty distributions, as an installer leaves them."""
    for i in range(NUM_PLUGINS):
        plugin_id, package = f"bench{i:02}", f"bench_plugin_{i:02}"
        (site / package).mkdir(parents=True)
        device = _DEVICE.format(package=package) if i < NUM_DEVICES else ""
        files = {
            "__init__.py": "", "plugin.py": _PLUGIN.format(id=plugin_id, package=package, device=device), "settings.py": _SETTINGS,
            "probe.py": "def probe():\n    return 'there is no such chip here'\n", "parts.py": "class X: pass\n",
        }  # fmt: skip
        for name, text in files.items():
            (site / package / name).write_text(text)
        info = site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: bench-{i:02}\nVersion: 1.0\nRequires-Dist: xllm-core>=0.1\n"
        )
        (info / "entry_points.txt").write_text(f"[xllm_core.plugins]\n{plugin_id} = {package}.plugin\n")
    return site


def write_model(path: Path) -> Path:
    """A random Llama of two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


if __name__ == "__main__":
    main()
